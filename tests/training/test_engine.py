import pytest

from training.config import load_config
from training.distributed import UserFault
from training.engine import check_machine


def test_the_compilation_of_cpu_adam_is_announced_with_its_time(monkeypatch, tmp_path):
    config, _ = load_config("configs/base.yaml", ["zero.offload_optimizer=cpu"])
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    announced = check_machine(config)
    assert "DeepSpeed's CPU Adam is compiled into" in announced and str(tmp_path) in announced and "about 100 s" in announced
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserFault, match=r"there is no C\+\+ compiler \(no-such-compiler\); install one .* or use zero.offload_optimizer=none"):
        check_machine(config)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserFault, match=r"train.compile=true: on a CPU .* there is none \(no-such-compiler\); install one .* or use false"):
        check_machine(load_config("configs/base.yaml", ["train.compile=true"])[0])
    (tmp_path / "cpu_adam").mkdir(exist_ok=True)
    (tmp_path / "cpu_adam" / "cpu_adam.so").touch()
    assert check_machine(config) is None, "it was compiled before"
    assert check_machine(load_config("configs/base.yaml")[0]) is None


def test_fp16_needs_a_device_that_has_it(monkeypatch):
    monkeypatch.setattr("training.engine.get_accelerator", lambda: type("Accelerator", (), {"is_fp16_supported": lambda self: False})())
    with pytest.raises(UserFault, match="train.precision=fp16: DeepSpeed trains in it on GPUs.* use bf16 or fp32"):
        check_machine(load_config("configs/base.yaml", ["train.precision=fp16", "zero.stage=1"])[0])
