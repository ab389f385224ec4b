"""Block inputs on their way to the host's memory and back, in the order of the copies; that gradients stay the same is in test_gpt.py."""

import weakref
from collections import deque

import torch

import model.offload
from model.checkpointing import Checkpointing
from model.offload import Offload, Waiting
from tests.model.test_gpt import build

LAYERS = 4


class Followed(Offload):
    """Notes each copy: "out" or "back", and which block's input it is."""

    def __init__(self, events: list):
        super().__init__()
        self.events, self.buffers = events, []

    def copy(self, source, target):
        way, host = ("out", target) if any(target is each for each in self.buffers) else ("back", source)
        super().copy(source, target)
        self.events.append((way, next(i for i, each in enumerate(self.buffers) if each is host)))

    def buffer(self, x):
        found = super().buffer(x)
        if not any(found is each for each in self.buffers):
            self.buffers.append(found)
        return found


def test_inputs_come_back_one_block_ahead_and_buffers_serve_again():
    events: list = []
    gpt, offload = build(layers=LAYERS), Followed(events)
    gpt.checkpointing = Checkpointing("full", offload=offload)
    for i, block in enumerate(gpt.blocks):
        block.register_forward_pre_hook(lambda *_, i=i: events.append(("block", i)))
    tokens = torch.randint(50, (2, 16))
    for step in range(2):
        loss = gpt(tokens, tokens)
        of = [i for way, i in events if way == "out"]
        assert events == [event for i in range(LAYERS) for event in (("out", of[i]), ("block", i))] and sorted(of) == list(range(LAYERS))
        events.clear()
        loss.backward()
        # The last one's is there still. Each of the others' sets out before the block after it is computed again.
        assert events == [("back", of[2]), ("block", 3), ("back", of[1]), ("block", 2), ("back", of[0]), ("block", 1), ("block", 0)]
        events.clear()
    assert len(offload.buffers) == LAYERS


def test_no_more_than_two_inputs_are_held_in_either_pass():
    alive, most = [], [0]

    def note(*_):
        most[0] = max(most[0], sum(waiting.here is not None for waiting in (reference() for reference in alive) if waiting))

    gpt, offload = build(layers=LAYERS), Offload()
    keep, gpt.checkpointing = offload.keep, Checkpointing("full", offload=offload)

    def keep_and_note(x):
        waiting = keep(x)
        alive.append(offload.newest)
        return waiting

    offload.keep = keep_and_note
    for block in gpt.blocks:
        block.register_forward_pre_hook(note)
    gpt(torch.randint(50, (2, 16)), torch.randint(50, (2, 16))).backward()
    assert most[0] == 1, "beside the one that the block works on"
    assert all(reference() is None for reference in alive)


def test_a_pass_without_a_backward_one_leaves_nothing_on_its_way(monkeypatch):
    gpt, offload, made = build(layers=LAYERS), Offload(), []
    monkeypatch.setattr(model.offload, "pinned_like", lambda x: made.append(torch.empty_like(x)) or made[-1])
    gpt.checkpointing = Checkpointing("full", offload=offload)
    tokens = torch.randint(50, (2, 16))
    gpt(tokens, tokens)
    assert offload.newest() is None
    gpt(tokens, tokens).backward()
    assert sum(map(len, offload.unused.values())) == LAYERS and len(made) == 2 * LAYERS
    with torch.no_grad():
        gpt(tokens, tokens)
    assert len(made) == 2 * LAYERS


class Postponed(Offload):
    """As a stream that is far behind: copies are made in their order, and no sooner than somebody waits for one."""

    def __init__(self):
        super().__init__()
        self.asked, self.hosts = deque(), []

    def buffer(self, x):
        self.hosts.append(super().buffer(x))
        return self.hosts[-1]

    def copy(self, source, target):
        if not any(target is host for host in self.hosts):
            target.fill_(torch.nan)
        done = [False]
        self.asked.append((weakref.ref(source), weakref.ref(target), done))
        return done

    def until(self, done):
        while not done[0]:
            source, target, this = self.asked.popleft()
            assert source() is not None and target() is not None, "let go of while a copy was under way"
            target().copy_(source())
            this[0] = True


def test_whoever_reads_or_frees_waits_for_the_copy(monkeypatch):
    """Over two micro batches, whose gradients add up, and a step more; every second block's input alone, too."""
    monkeypatch.setattr(Waiting, "_wait", lambda waiting: waiting.offload.until(waiting.done))
    gpt, found = build(layers=LAYERS), []
    micro_batches = torch.randint(50, (3, 2, 16))
    for offload, every in ((None, 1), (Postponed(), 1), (Postponed(), 2)):
        gpt.checkpointing = Checkpointing("every_n", every=every, offload=offload) if offload else Checkpointing()
        gpt.zero_grad()
        gradients = []
        for tokens in micro_batches:
            gpt(tokens, tokens).backward()
            gradients += [p.grad.clone() for p in gpt.parameters()]
        found.append(gradients)
        assert offload is None or not offload.asked and len({id(host) for host in offload.hosts}) == LAYERS // every
    for gradients in found[1:]:
        assert all(map(torch.equal, gradients, found[0]))
