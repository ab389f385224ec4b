"""ZeRO-3's sums of gradients, its gathered parameters and its step with less for the host to do, and less for the GPU to wait for.

What DeepSpeed 0.19.8 does of this is right, and slow where a step is short. Every function here says what it puts in the place of what; a
name of DeepSpeed's that is no longer there is a RuntimeError when the engine is built.
"""

import math
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import nn

from training.buckets import plan_buckets


def shorten_step(engine: deepspeed.DeepSpeedEngine, *, on_gpu_only: bool) -> None:
    """Have DeepSpeed's engine with stage 3, without offload of the optimizer, do as the functions below say.

    on_gpu_only: no parameter waits on the host.
    """
    try:
        _shorten(engine, on_gpu_only)
    except AttributeError as fault:
        raise _changed(str(fault)) from fault


def _shorten(engine: deepspeed.DeepSpeedEngine, on_gpu_only: bool) -> None:
    zero, parameters = engine.optimizer, list(engine.module.parameters())
    GradientBuckets(zero)
    take_flat_gradients(zero)
    keep_views(zero)
    staying = [p for p in parameters if p.ds_persist] if on_gpu_only else []
    if len(staying) == len(parameters):
        leave_modules_alone(engine)
        release = lambda: None  # noqa: E731
    else:
        drop_idle_hooks(zero, staying)
        release = zero._partition_all_parameters
    if staying:
        stay_gathered(engine, staying)
    if zero.dtype != torch.float16 and isinstance(zero.optimizer, torch.optim.AdamW):
        step_without_waiting(zero)
    gather_after_writing(zero)
    release_late(zero, release)


def _changed(what: str) -> RuntimeError:
    return RuntimeError(
        f"DeepSpeed {deepspeed.__version__} is not what training/zero3_step.py relies on ({what}); "
        "install the version in the constraints file"
    )


def _replace(part: object, **functions: Callable) -> None:
    for name, function in functions.items():
        getattr(part, name)  # what is no longer there nobody would call
        setattr(part, name, function)


class Bucket(NamedTuple):
    """Gradients that are summed over the ranks together. pieces: elements of this rank's share of each; sums: where those are added up."""

    parameters: list[nn.Parameter]
    pieces: list[int]
    sums: list[torch.Tensor]


class GradientBuckets:
    """Sums gradients over the ranks, bucket by bucket while the backward pass goes on, and adds this rank's pieces up over micro batches.

    In the place of DeepSpeed's hooks: of those around each leaf module and of what they do with each gradient on its own (copy it, have one
    stream wait for another, cut it, convert it, add it, mark it for the allocator). What is in a bucket is settled beforehand, from the
    last parameter to the first, and buckets are summed in that order, so that no rank waits for another's whatever order gradients come
    in, and a parameter that had no part in a rank's loss counts with zeros. (Outside of leaf modules, where any are gathered, it must have
    had none on every rank: nothing else tells a rank when to go on, and sums and gathers come in one order on all of them.) A leaf module's
    are summed when all of them are there: then its activations no longer are. One kernel lays a bucket's gradients out for the ranks and
    converts them; one divides this rank's sums, one adds them. One bucket at a time is under way; the host waits for none.

    On a GPU gradients are of the stream on which the backward pass computes, and are laid out there, into ``under_way``. DeepSpeed's stream
    for sums waits for that; what it allocates and writes besides, up to the sums in the flat buffer, is of itself alone. The first waits
    for the second before ``under_way`` is let go of, and at the end of the backward pass for the last sums.
    """

    def __init__(self, zero: DeepSpeedZeroOptimizer_Stage3):
        self.zero = zero
        parameters = sorted((p for group in zero.fp16_groups for p in group if p.requires_grad), key=lambda p: p.ds_id, reverse=True)
        self.group = zero._get_param_partition_group(parameters[0])
        self.world = dist.get_world_size(self.group)
        partitions = zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        of_leaf: dict[object, list[nn.Parameter]] = {}  # or of a parameter that is in none, alone
        for parameter in parameters:
            of_leaf.setdefault(id(getattr(parameter, "ds_z3_leaf_module", parameter)), []).append(parameter)
        self.number = {leaf: number for number, leaf in enumerate(of_leaf)}
        modules = list(of_leaf.values())
        parameters = [parameter for module in modules for parameter in module]  # the order that plan_buckets counts in

        def bucket(places: range) -> Bucket:
            of_it = parameters[places.start : places.stop]
            pieces = [math.ceil(p.ds_numel / self.world) for p in of_it]  # as DeepSpeed cuts
            return Bucket(of_it, pieces, [partitions[p.ds_id] for p in of_it])

        planned = plan_buckets([[p.ds_numel for p in module] for module in modules], zero.reduce_bucket_size)
        self.due = [[bucket(places) for places in of_module] for of_module in planned]  # module by module
        self.sizes = [len(module) for module in modules]
        self.under_way: tuple[torch.Tensor, torch.cuda.Event | None] | None = None
        self._expect_all()
        for hook in (*zero._grad_acc_hooks, *zero._leaf_module_hooks):
            hook.remove()
        zero._leaf_module_hooks.clear()
        zero._grad_acc_hooks[:] = [parameter.register_post_accumulate_grad_hook(self._arrived(number))
                                   for number, module in enumerate(modules) for parameter in module]
        _replace(zero, overlapping_partition_gradients_reduce_epilogue=self.finish)
        offload = zero.parameter_offload
        _replace(offload, post_sub_module_backward_function=_after(self._end_of_module, offload.post_sub_module_backward_function))

    def _expect_all(self) -> None:
        self.next, self.missing = 0, list(self.sizes)

    def _arrived(self, number: int) -> Callable[[nn.Parameter], None]:
        def arrived(parameter: nn.Parameter) -> None:
            self.missing[number] -= 1
            if number < self.next or self.missing[number] < 0:
                raise RuntimeError(f"a parameter of shape {list(parameter.ds_shape)} had a gradient after its sum: several of ZeRO-3's leaf modules or of "
                                   "the checkpointed ones share it, or the model registers it behind modules that run after it; use zero.stage: 2")  # fmt: skip
            while self.next < len(self.missing) and self.missing[self.next] == 0:
                self._sum_next()

        return arrived

    def _end_of_module(self, module: nn.Module) -> None:
        """No more gradients of a leaf module come now: on all ranks its sums are before the gathers for the next."""
        while self.next <= self.number.get(id(module), -1):
            self._sum_next()

    def _sum_next(self) -> None:
        for bucket in self.due[self.next]:
            self._sum(bucket)
        self.next += 1

    def finish(self) -> None:
        """After a backward pass: what is left, for the stream that goes on to have."""
        while self.next < len(self.due):
            self._sum_next()
        self._take_back()
        if self.zero.reduce_and_partition_stream is not None:  # where DeepSpeed looks for what is not finite, in fp16
            self.zero.reduce_and_partition_stream.wait_stream(torch.cuda.current_stream())
        self._expect_all()
        self.zero._epilogue_ran_this_backward = True  # by which DeepSpeed counts micro batches

    def _take_back(self) -> None:
        """The memory of the bucket whose sums are under way, for what this stream does next."""
        if self.under_way is not None and self.under_way[1] is not None:
            torch.cuda.current_stream().wait_event(self.under_way[1])
        self.under_way = None

    @torch.no_grad()
    def _sum(self, bucket: Bucket) -> None:
        self._take_back()  # one at a time: its sums have had the time in which this bucket filled
        zero, stream = self.zero, self.zero.reduce_and_partition_stream
        gradients = [p.new_zeros(p.ds_numel) if p.grad is None else p.grad.reshape(-1) for p in bucket.parameters]
        everyones = gradients[0].new_empty(self.world, sum(bucket.pieces), dtype=zero.communication_data_type)
        torch._chunk_cat(gradients, 0, self.world, out=everyones)
        for parameter in bucket.parameters:
            parameter.grad = None
        if self.world == 1:
            self._add(bucket, everyones)
        elif stream is None:  # on a CPU
            self._add(bucket, everyones)
            self.under_way = everyones, None  # as on a GPU, so that memory there can be followed here
        else:
            done = torch.cuda.Event()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._add(bucket, everyones)
                done.record()
            self.under_way = everyones, done

    def _add(self, bucket: Bucket, everyones: torch.Tensor) -> None:
        mine = everyones[0]
        if self.world > 1:
            mine = torch.empty_like(mine)
            dist.reduce_scatter_tensor(mine, everyones.view(-1), group=self.group)
            mine = mine.to(self.zero.gradient_accumulation_dtype).div_(self.world)
        add = torch._foreach_copy_ if self.zero.micro_step_id == 0 else torch._foreach_add_
        add(bucket.sums, mine.to(self.zero.gradient_accumulation_dtype).split(bucket.pieces))


def take_flat_gradients(zero: DeepSpeedZeroOptimizer_Stage3) -> None:
    """Norm and step take the gradients from the flat buffer; clipping scales it in place.

    In the place of a norm parameter by parameter, for which each gradient is copied to float64, and of a copy of the gradients of each
    sub-group to another flat buffer. What pads a parameter to equal pieces is 0 in it, and the first micro batch of a step writes all else
    anew.
    """
    ends = accumulate((sum(p.partition_numel() for p in group) for group in zero.fp16_groups), initial=0)
    gradients = [zero.grad_partitions_flat_buffer[start:end] for start, end in pairwise(ends)]

    def norms_of_groups() -> list[torch.Tensor]:
        # In float64 as DeepSpeed's, but for no copy in it: of PyTorch's norms this one alone converts as it reads.
        squares = torch.stack(torch._foreach_norm(gradients, 2.0, dtype=torch.float64)).square()
        dist.all_reduce(squares)
        norms = squares.sqrt()
        return list(norms.where(norms.isfinite(), -1.0))  # which is what the caller takes for not finite

    def hand_to_optimizer(group: int) -> None:
        flat = zero.fp32_partitioned_groups_flat[group]
        flat.grad = gradients[group].to(flat.dtype)

    _replace(zero, _get_norm_groups=norms_of_groups, _prepare_fp32_grad_for_sub_group=hand_to_optimizer)


def step_without_waiting(zero: DeepSpeedZeroOptimizer_Stage3) -> None:
    """The host does not ask for the norm: where it is not finite, torch's fused AdamW itself changes neither parameter nor state.

    In the place of a step that waits for the GPU to end the backward pass before it asks for the update. The kernel of the update also clips,
    in place of one more over the gradients. Not for fp16, whose loss scale is settled on the host, and not for Muon.
    """
    optimizer = zero.optimizer

    @torch.no_grad()
    def step(closure: None = None) -> None:
        zero._pre_step()
        zero.overflow = False  # which would say so to the host
        norm = zero._global_grad_norm = combine_grad_norm_groups(zero._get_norm_groups())  # infinite where a group's is not finite
        optimizer.found_inf = norm.isinf().float()
        optimizer.grad_scale = ((norm + 1e-6) / zero.clip_grad).clamp(min=1.0).float() if zero.clip_grad > 0 else None
        zero.zero_grad(set_to_none=True)
        for group in range(len(zero.fp16_groups)):
            zero._prepare_fp32_grad_for_sub_group(group)
            zero._optimizer_step(group)
            zero._reassign_or_swap_out_partitioned_parameters(group)
            zero.fp32_partitioned_groups_flat[group].grad = None
        zero._post_step(set())

    _replace(zero, step=step)


def keep_views(zero: DeepSpeedZeroOptimizer_Stage3) -> None:
    """The rank's pieces of parameters are views of one flat tensor for good; DeepSpeed makes them anew every step."""
    for flat, pieces in zip(zero.fp16_partitioned_groups_flat, zero.fp16_partitioned_groups, strict=True):
        starts = accumulate((piece.numel() for piece in pieces[:-1]), initial=0)
        if any(piece.data_ptr() != flat[start:].data_ptr() for start, piece in zip(starts, pieces, strict=True)):
            raise _changed("pieces of parameters are not side by side in one tensor")
    _replace(zero, _unflatten_partitioned_parameters=lambda group: None)


def leave_modules_alone(engine: deepspeed.DeepSpeedEngine) -> None:
    """Where every parameter stays on every rank, none of what DeepSpeed does around modules is done."""
    engine.optimizer.parameter_offload._remove_module_hooks()
    # Theirs are clocks, which are off, and a mark on every module for parameters that are used outside of theirs.
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()
    for module in engine.module.modules():
        module._parameters = dict(module._parameters)  # DeepSpeed's kind of dict looks at every parameter that it hands out


def drop_idle_hooks(zero: DeepSpeedZeroOptimizer_Stage3, staying: list[nn.Parameter]) -> None:
    """No hooks around a module that has no parameter to gather: of its own, or for a leaf module of those inside of it."""
    offload, gathered, idle = zero.parameter_offload, {id(p) for p in staying}, set()
    for module in offload.module.modules():
        if all(id(p) in gathered for p in module.parameters(recurse=deepspeed.utils.z3_leaf_module(module))):
            idle |= {id(module._forward_pre_hooks), id(module._forward_hooks)}
    for hook in (*offload.forward_hooks, *offload.backward_hooks):
        if id(hook.hooks_dict_ref()) in idle:
            hook.remove()


def stay_gathered(engine: deepspeed.DeepSpeedEngine, staying: list[nn.Parameter]) -> None:
    """Every rank's pieces of parameters that stay come to all ranks by one gather for all, and one kernel that puts them in their places.

    DeepSpeed gathers each by itself, into new memory, after each step and checkpoint, and has the host wait. What else lets go of them,
    such as deepspeed.zero.GatheredParameters, may: they are gathered again when the model is called.
    """
    zero = engine.optimizer
    process_group = zero._get_param_partition_group(staying[0])
    world = dist.get_world_size(process_group)
    pieces = [p.partition_numel() for p in staying]
    if world > 1:
        wholes = [p.ds_tensor.new_empty(world, piece) for p, piece in zip(staying, pieces, strict=True)]
        views = [whole.view(-1)[: p.ds_numel].view(p.ds_shape) for p, whole in zip(staying, wholes, strict=True)]
    else:
        views = [p.ds_tensor.view(p.ds_shape) for p in staying]  # each is its own piece, and has the new values already

    @torch.no_grad()
    def renew() -> None:
        if world > 1:
            mine = torch.cat([p.ds_tensor for p in staying])
            everyones = mine.new_empty(world, len(mine))
            dist.all_gather_into_tensor(everyones.view(-1), mine, group=process_group)
            torch.split_with_sizes_copy(everyones, pieces, dim=1, out=wholes)
        for parameter, view in zip(staying, views, strict=True):
            if parameter.data_ptr() != view.data_ptr():  # DeepSpeed has let go of it, or gathered it elsewhere
                if parameter.is_cuda:  # in memory of its stream for gathers, which this one may still read
                    parameter.data.record_stream(torch.cuda.current_stream())
                parameter.data, parameter.ds_status = view, ZeroParamStatus.AVAILABLE

    def renew_missing(*_) -> None:
        if any(p.ds_status == ZeroParamStatus.NOT_AVAILABLE for p in staying):
            renew()

    renew()
    zero.persistent_parameters.clear()  # so that DeepSpeed gathers none after a step
    _replace(zero, checkpoint_event_epilogue=renew, _post_step=_after(lambda _: renew(), zero._post_step))
    engine.module.register_forward_pre_hook(renew_missing)


def _after(first: Callable, then: Callable) -> Callable:
    def both(*arguments) -> None:
        first(*arguments)
        then(*arguments)

    return both


def gather_after_writing(zero: DeepSpeedZeroOptimizer_Stage3) -> None:
    """DeepSpeed's stream for gathers waits until this rank's pieces are written: by a step, by a loaded checkpoint, before training.

    By itself it waits for nothing: it is the host that does, for DeepSpeed's clock and for the parameters that stay, of which neither is
    left.
    """
    stream = zero.parameter_offload._DeepSpeedZeRoOffload__allgather_stream
    if stream is None:  # on a CPU
        return

    def follow(*_) -> None:
        stream.wait_stream(torch.cuda.current_stream())

    follow()
    _replace(zero, _post_step=_after(follow, zero._post_step), checkpoint_event_epilogue=_after(follow, zero.checkpoint_event_epilogue))


def release_late(zero: DeepSpeedZeroOptimizer_Stage3, release: Callable[[], None]) -> None:
    """Within the step, gathered parameters are let go of once the GPU has the update to compute, which is of this rank's pieces alone.

    DeepSpeed lets go of them first, when the GPU has nothing to do.
    """
    step, finish = zero.step, zero._post_step

    def step_and_release(closure: None = None) -> None:
        zero._partition_all_parameters, zero._post_step = lambda: None, _after(lambda _: release(), finish)
        try:
            step()
        finally:
            del zero._partition_all_parameters
            zero._post_step = finish
        if zero.overflow:  # the step ended early
            release()

    zero.step = step_and_release
