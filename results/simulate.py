"""An update of opsdc.py at any size, simulated: its own sharding, loss, backward pass, clipping and
AdamW on fake tensors, which have shapes and no data. `python results/bench.py memory` prints it.

Counted are the bytes of all tensors that are alive. What is not simulated: blocks that CUDA's
allocator can't fill, memory of the libraries (one or two GB), and time. So 8% of a GPU should be to
spare. One process plays one rank of many: the others' part of a collective has no effect on memory.
"""

import weakref
from collections import Counter
from functools import partial
from unittest import mock

import torch
import torch.distributed as dist
import transformers as hf
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import opsdc

BATCH, PROMPT_TOKENS, TOKENS = 32, 1024, 8192  # the paper's limits: every rollout is the longest
GPU = torch.device("cpu:1")  # a name: torch has no fake GPU where it was built without GPUs


class Ledger(TorchDispatchMode):
    """Sees every operation. `alive`: bytes by device; `peaks`: their maximum and its phase; `held`:
    bytes on the GPU when the update is done; `work`: FLOPs of matrix products and attention, and
    bytes sent. Where the code asks for data, each completion has TOKENS tokens, and the gradient's
    norm is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.phase, self.known = "", {}  # known: device and bytes of each storage
        self.alive, self.peaks, self.held, self.work = Counter(), {}, 0, Counter()

    def book(self, storage: int, size: int) -> None:
        device, before = self.known[storage]
        self.known[storage] = device, size
        self.alive[device] += size - before
        self.peaks[device] = max(self.peaks.get(device, (0, "")), (self.alive[device], self.phase))

    def forget(self, storage: int) -> None:
        self.book(storage, 0)
        del self.known[storage]

    def answer(self, op, name: str, args: tuple, kwargs: dict) -> object:
        """The result of an operation, also where it depends on data."""
        if name == "_local_scalar_dense":  # item()
            return 1.0 if args[0].is_floating_point() else TOKENS
        if name == "_pin_memory":
            return args[0]
        if name == "repeat_interleave":  # a weight for each token
            return args[0].new_zeros(len(args[0]) * TOKENS)
        if name == "index" and args[1][0].dtype == torch.bool:  # the states that `align` marks
            marked = args[0].new_zeros(len(args[0]) * TOKENS, dtype=torch.long)
            return op(args[0].flatten(0, 1), [marked])
        return op(*args, **kwargs)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # the tensors inside come next
        name, kwargs = op.overloadpacket.__name__, kwargs or {}
        out = self.answer(op, name, args, kwargs)
        given, made = (
            [leaf for leaf in tree_leaves(part) if isinstance(leaf, torch.Tensor)]
            for part in (args, out)
        )
        for tensor in made:
            storage = tensor.untyped_storage()
            if id(storage) not in self.known:
                self.known[id(storage)] = str(tensor.device), 0
                weakref.finalize(storage, self.forget, id(storage))
            self.book(id(storage), storage.nbytes())
        plain = name.removesuffix("_").replace("_for_cpu", "")  # addmm_ costs what addmm does
        counted = getattr(torch.ops.aten, plain, None)
        if counted in flop_registry:
            self.work["FLOP"] += flop_registry[counted](*args, **kwargs, out_val=out)
        if "c10d" in op.namespace and ("gather" in name or "scatter" in name):
            self.work["between GPUs"] += max(tensor.nbytes for tensor in given + made)
        if name in ("_to_copy", "copy_") and made[0].device != given[-1].device:
            self.work["over PCIe"] += given[-1].nbytes
        return out


def simulate(shape: hf.PreTrainedConfig, ranks: int, offload: bool, micro: int) -> Ledger:
    """The update of one rank in bf16, in micro-batches of `micro` rollouts."""
    ledger, micro_batches = Ledger(), BATCH // ranks // micro
    config = opsdc.Config(dtype="bfloat16", offload=offload)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    fully_shard = partial(opsdc.fsdp.fully_shard, mesh=init_device_mesh("cpu", (ranks,)))
    resize_storage, apply_loss = torch.UntypedStorage.resize_, opsdc.ChunkedDivergence.apply

    def resize(storage: torch.UntypedStorage, size: int) -> None:  # FSDP frees weights by it
        resize_storage(storage, size)
        if id(storage) in ledger.known:
            ledger.book(id(storage), size)

    def loss_phase(*arguments) -> tuple:
        ledger.phase = "loss"
        return apply_loss(*arguments)

    def model(dtype: torch.dtype) -> opsdc.Model:
        with GPU:
            return hf.AutoModelForCausalLM.from_config(shape, dtype=dtype).eval()

    device_of_mesh = "torch.distributed.fsdp._fully_shard._fully_shard._get_device_from_mesh"
    with (
        mock.patch.multiple(opsdc, CUDA=True, DEVICE=GPU),
        mock.patch.object(opsdc.fsdp, "fully_shard", fully_shard),
        mock.patch(device_of_mesh, lambda _: GPU),
        mock.patch.object(hf.masking_utils, "is_tracing", lambda *_: False),  # else with a mask
        mock.patch.object(torch.nn.Module, "float", lambda module: module),  # models are fp32
        mock.patch.object(torch.UntypedStorage, "resize_", resize),
        mock.patch.object(opsdc.ChunkedDivergence, "apply", loss_phase),
        FakeTensorMode(allow_non_fake_inputs=True),
        ledger,
    ):
        student = opsdc.shard(model(torch.float32), config)
        teacher = opsdc.shard(model(torch.float32).requires_grad_(False), config)
        sampler = model(torch.bfloat16)
        optimizer = torch.optim.AdamW(student.parameters(), fused=True)
        for weight in student.parameters():
            weight.grad = torch.zeros_like(weight)
        optimizer.step()  # makes AdamW's state
        if micro_batches == 1:  # else there are gradients of earlier ones, and this is the last
            optimizer.zero_grad()
        for weight in sampler.parameters():  # as `train` does before an update
            weight.data = weight.new_empty(0)
        ledger.peaks.clear()
        ledger.work.clear()
        ledger.phase = "forward"
        triples = [([0] * PROMPT_TOKENS, [0] * PROMPT_TOKENS, [0] * TOKENS)] * micro
        loss, _ = opsdc.distillation_loss(student, teacher, triples, "reverse_kl", BATCH // ranks)
        ledger.phase = "backward"
        loss.backward()
        ledger.work = Counter({name: n * micro_batches for name, n in ledger.work.items()})
        ledger.phase = "clipping"
        teacher.reshard()
        opsdc.clip_gradients(student, config.max_grad_norm)
        ledger.phase = "AdamW"
        optimizer.step()
        optimizer.zero_grad()
        ledger.phase = "copy"
        opsdc.copy_to_sampler(student, sampler)
        ledger.held = ledger.alive[str(GPU)]
    dist.destroy_process_group()
    ledger.work["between GPUs"] *= 1 - 1 / ranks  # all but a GPU's own share
    return ledger
