"""The only file that uses DeepSpeed: ZeRO 1, 2 and 3 behind `forward, backward, step`, with all state in and out by
name.

DeepSpeed 0.19.8 keeps this rank's share of the fp32 weights in flat tensors, under names that are not public API (hence
the exact pin):

    ZeRO 1, 2   optimizer.single_partition_of_fp32_groups, one per group; `param._hp_mapping` gives the slice of each
                parameter
    ZeRO 3      optimizer.fp32_partitioned_groups_flat, one per sub-group; `optimizer.grad_position`, even slices

`_layout` converts both to `Piece`s (training/optim/pieces.py), which everything else (checkpoints, averages, import)
uses. DeepSpeed's own checkpoints cannot be loaded at another world size or stage, their `latest` is written before the
shards are complete, and its setters for full tensors fail under ZeRO 3 if the world size does not divide a parameter's
size.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch

from data_pipeline.common.python import importing
from training.config.experiment import Experiment
from training.engine.base import (
    DTYPES,
    Judge,
    Snapshot,
    StepInfo,
    WeightKeeper,
    accept,
    in_precision,
    saved_buffers,
    set_step,
    trained_parameters,
)
from training.engine.fixed_order import FixedOrder, mark_borders
from training.engine.snapshots import ShardedSnapshot
from training.optim.averages import state_name
from training.optim.base import Sharding
from training.optim.pieces import Assembler, Layout, Piece, Shapes, scatter
from training.optim.registry import build_optimizer, learning_rate
from training.processes.collectives import all_sum, gather_objects
from training.processes.ranks import Ranks


def join_groups() -> None:
    """Let DeepSpeed use the existing process group."""
    import_deepspeed().init_distributed(auto_mpi_discovery=False, verbose=False)


def import_deepspeed() -> Any:
    """Import DeepSpeed, silencing its logs and without compiling `deepspeed_shm_comm` (minutes of g++ at first use, and
    not needed here). It would ask the compilers of the machine about each of its operators, in every process; only that
    one's answer is ever read."""
    if not torch.cuda.is_available():  # also if a shell says cuda, which would end in a traceback
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    with importing():
        import deepspeed

        _import_muon_uncompiled()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    return deepspeed


def _import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon without torch's compiler: DeepSpeed imports it for any optimizer, which would cost 4 s at
    every start."""
    from deepspeed.runtime import compiler

    compile_function = compiler.compile
    compiler.compile = lambda *_, **__: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        compiler.compile = compile_function


@contextmanager
def _parameters_unprinted() -> Iterator[None]:
    """Give parameters a short text: ZeRO 3 composes a message with all of them, values included, and prints it
    nowhere."""
    text = torch.nn.Parameter.__repr__
    torch.nn.Parameter.__repr__ = object.__repr__  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.nn.Parameter.__repr__ = text  # type: ignore[assignment, method-assign]


def _keep_compiler_out_of_hooks(model: torch.nn.Module) -> None:
    """Exclude DeepSpeed's hooks, in which ZeRO 3 fetches the weights of each module, from compilation. DeepSpeed itself
    excludes two of four; tracing the others, again for each shape, would compile no more of the model."""
    if all(module._compiled_call_impl is None for module in model.modules()):
        return
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number, hook in hooks.items():
                if hook.__module__.startswith("deepspeed."):
                    hooks[number] = torch.compiler.disable(hook)


def deepspeed_config(config: Experiment, ranks: Ranks, accumulate: int) -> dict[str, Any]:
    """Return the config dictionary for `deepspeed.initialize`."""
    on_gpu = ranks.device != "cpu"
    zero: dict[str, Any] = {"stage": config.zero.stage, "overlap_comm": on_gpu}
    if config.train.deterministic_reduction:  # DeepSpeed's linear layer rounds bf16 once more than torch's
        zero["memory_efficient_linear"] = False
    if config.zero.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    if config.zero.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": on_gpu}
    return {
        "train_batch_size": config.data.global_batch,
        "train_micro_batch_size_per_gpu": config.data.share_of(ranks.world_size) // accumulate,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": config.optimizer.clip_norm,
        "bf16": {"enabled": config.precision.dtype == "bf16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


class ZeroEngine(WeightKeeper):
    """An Engine (training/engine/base.py) under ZeRO 1, 2 or 3."""

    def __init__(self, model: torch.nn.Module, config: Experiment, ranks: Ranks, accumulate: int = 1) -> None:
        self.dtype = DTYPES[config.precision.dtype]
        self._accumulate, self._micro_batches = accumulate, 0
        trained, fused = trained_parameters(model), ranks.device != "cpu" and not config.zero.offload_optimizer
        shapes: Shapes = {name: tuple(p.shape) for name, p in trained.items()}
        optimizer = build_optimizer(trained.values(), config.optimizer, fused=fused)
        if config.train.deterministic_reduction and config.zero.stage < 3:
            mark_borders(model)
        with _parameters_unprinted():
            self._engine, *_ = import_deepspeed().initialize(
                model=model, optimizer=optimizer, config=deepspeed_config(config, ranks, accumulate)
            )
        self._zero = self._engine.optimizer
        super().__init__(config, ranks, self._engine.module)
        self._question: tuple[torch.Tensor | float, Sequence[float], Judge] = (math.nan, (), accept)
        self._answer: tuple[float, list[float], str] = (math.nan, [], "")
        self._fused = not config.zero.offload_optimizer
        if self._fused:
            self._decide_with_the_norm()
        if config.zero.stage == 3:
            self._gather_persistent_at_once()
            _keep_compiler_out_of_hooks(self._engine.module)
        self._pieces = self._layout()
        layout: Layout = gather_objects(self._pieces, ranks)
        self._assembler = Assembler(layout, shapes, ranks.rank)
        self._optimizer = optimizer
        optimizer.shard(Sharding(self._flats, layout, shapes, ranks.rank, self._add_up))
        self._averages = [state_name(i) for i in range(len(config.ema.decays))]
        self._names = [*optimizer.SLICED, *self._averages]
        self._order: FixedOrder | None = None
        self._called: dict[torch.Tensor, str] = {p: name for name, p in trained_parameters(self.module).items()}
        self._taken: dict[str, torch.Tensor] = {}
        """Gradients of the current micro-batch, if `_order` sums them."""
        if config.train.deterministic_reduction:
            self._reduce_in_fixed_order(layout)
        self._allocate()
        self.set_timeout(config.train.timeout_first_s)

    def __call__(self, x: torch.Tensor, log_snr: torch.Tensor, text: torch.Tensor, *rest: Any) -> torch.Tensor:
        """`UNet.forward`."""
        return self._engine(*in_precision(self.config.precision, x, log_snr, text, *rest)).float()

    def backward(self, loss: torch.Tensor) -> None:
        """See Engine."""
        if self._order is None:
            self._engine.backward(loss)
        else:
            self._engine.backward(loss, scale_wrt_gas=False)
            self._take(*self._called)
            self._order.add(self._micro_batches, self._taken, loss)
            self._taken = {}
        self._micro_batches += 1
        if self._micro_batches < self._accumulate:
            self._engine.step()  # only counts micro-batches until the last one

    def step(
        self, step: int, share: torch.Tensor | float = math.nan, votes: Sequence[float] = (), judge: Judge = accept
    ) -> StepInfo:
        """See Engine."""
        self._settle()
        lr = learning_rate(step, self.config.optimizer, self.config.train.steps)
        set_step(self._optimizer, lr, self.config.ema, self.updates)
        self._question = (share, votes, judge)
        if not self._fused:
            self._ask(None)
        if self._order is not None:
            self._give_back(self._order.mean())
        with nullcontext() if self._fused or not self._answer[2] else self._refusing():
            self._engine.step()
        self._micro_batches = 0
        norm = float(self._engine.get_global_grad_norm())  # already on the host
        skipped = not self._engine.was_step_applied()
        self.updates += not skipped
        return StepInfo(float("inf") if skipped else norm, skipped, lr, *self._answer)

    def _ask(self, squares: torch.Tensor | None) -> list[float]:
        """Sum squared gradients, losses and votes over the ranks; return the sums of `squares`. Apart from those for
        gradients, this is the only collective of a step, and the only time that the host waits for the GPU."""
        share, votes, judge = self._question
        device = self.ranks.device
        own = torch.as_tensor(share, dtype=torch.float64).to(device, non_blocking=True).detach().reshape(1)
        if self._order is not None:
            own = self._order.losses()
        told = torch.tensor(votes, dtype=torch.float64).to(device, non_blocking=True)
        squares = torch.zeros(1, dtype=torch.float64, device=device) if squares is None else squares.reshape(-1)
        sums = torch.cat([squares, own, told])
        torch.distributed.all_reduce(sums, group=self._zero.dp_process_group)
        values = sums.tolist()
        places = len(squares), len(squares) + len(own)
        losses, counted = values[places[0] : places[1]], values[places[1] :]
        loss = math.fsum(losses) / (self.ranks.world_size if self._order is None else len(losses))
        self._answer = loss, counted, judge(loss, counted)
        return values[: places[0]]

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Inside the context, a step treats the gradients as not finite: DeepSpeed discards them, and nothing else
        changes."""
        zero, checked = self._zero, self._zero.check_grad_overflow if self.config.zero.stage < 3 else None
        name = "_overflow_check_and_loss_scale_update" if self.config.zero.stage == 3 else "check_overflow"
        if checked is not None:
            zero.check_grad_overflow = True
        own = getattr(zero, name)
        setattr(zero, name, lambda *_, **__: setattr(zero, "overflow", True))
        try:
            yield
        finally:
            setattr(zero, name, own)
            if checked is not None:
                zero.check_grad_overflow = checked

    def _decide_with_the_norm(self) -> None:
        """Replace DeepSpeed's gradient norm by `_gradient_norm`: it launches a dozen kernels per parameter, for which
        the GPU has to wait."""
        if self.config.zero.stage == 3:
            self._zero._get_norm_groups = lambda: [self._gradient_norm()]
            return
        self._zero.check_overflow, self._zero.check_grad_overflow = lambda *_, **__: None, True
        self._zero.scaled_global_norm = self._gradient_norm

    def _gradient_norm(self, *_: Any, **__: Any) -> torch.Tensor:
        """Return the global gradient norm on the host; if it is not finite, DeepSpeed skips the step."""
        groups = self._zero.averaged_gradients.values()
        gradients = [g for group in groups for g in group or () if g is not None and g.numel()]
        if self._order is not None:
            norm = self._order.norm(gradients, self._ask)
        else:
            norms = torch._foreach_norm(gradients, 2, dtype=torch.float32) if gradients else ()
            norm = math.sqrt(self._ask(torch.stack(norms).to(torch.float64).square().sum() if norms else None)[0])
        return torch.tensor(math.inf if self._answer[2] else norm, dtype=torch.float32)

    # ------------------------------------------------------------------- the same bits on any number of ranks

    def _reduce_in_fixed_order(self, layout: Layout) -> None:
        """Intercept gradients as they are computed, and hand DeepSpeed their mean at the step."""
        zero, leaves = self._zero, self.ranks.world_size * self._accumulate
        group = zero.dp_process_group if self.ranks.world_size > 1 else None
        self._order = FixedOrder(leaves, layout, self.ranks.rank, group, self.ranks.device)
        if self.config.zero.stage == 3:
            zero.reduce_ready_partitions_and_remove_grads = self._take
        else:
            zero.process_gradients = lambda parameter, _group: self._take(parameter)
            zero.reduce_gradients = lambda *_, **__: None
        zero.independent_gradient_partition_epilogue = lambda: None

    def _take(self, *parameters: torch.Tensor) -> None:
        for parameter in parameters:
            if parameter.grad is not None:
                self._taken[self._called[parameter]], parameter.grad = parameter.grad, None

    def _give_back(self, mean: torch.Tensor) -> None:
        """Hand DeepSpeed this rank's slices of the mean gradient, in flat tensors like those of the weights."""
        flats = [torch.zeros_like(flat) for flat in self._flats]
        for piece, part in zip(self._pieces, mean.split([piece.size for piece in self._pieces]), strict=True):
            piece.of(flats).copy_(part)
        for index, flat in enumerate(flats):
            self._zero.averaged_gradients[index] = [flat]

    def _gather_persistent_at_once(self) -> None:
        """Gather the small parameters that ZeRO 3 keeps whole in one message after a step; DeepSpeed sends one for
        each."""
        persistent = self._zero.persistent_parameters
        if persistent:

            def gather(param_list: list[Any], **_: Any) -> None:
                waiting = [p for p in param_list if p.ds_status.name == "NOT_AVAILABLE"]
                if waiting:
                    persistent[0].all_gather_coalesced(waiting).wait()

            persistent[0].all_gather = gather

    def norm(self) -> float:
        """See Engine."""
        return math.sqrt(all_sum([self.squared_norm()], self.ranks)[0])

    def set_timeout(self, seconds: float) -> None:
        """See Engine. DeepSpeed sets no time-out for its own groups, which would wait 10 to 30 minutes for a rank that
        hangs."""
        import torch.distributed.distributed_c10d as c10d

        for group in list(c10d._world.pg_map):
            if group is not self.ranks.background:
                c10d._set_pg_timeout(timedelta(seconds=seconds), group)

    def _add_up(self, sums: torch.Tensor) -> None:
        """Sum a tensor over the ranks, in place."""
        if self.ranks.world_size > 1:
            torch.distributed.all_reduce(sums, group=None if sums.is_cuda else self.ranks.control)

    # ------------------------------------------------------------------------- DeepSpeed's flat tensors

    @property
    def _flats(self) -> list[torch.Tensor]:
        """This rank's fp32 weights."""
        if self.config.zero.stage == 3:
            return list(self._zero.fp32_partitioned_groups_flat)
        return list(self._zero.single_partition_of_fp32_groups)

    def _layout(self) -> list[Piece]:
        names = {parameter: name for name, parameter in trained_parameters(self.module).items()}
        pieces = []
        if self.config.zero.stage == 3:
            for parameter, name in names.items():
                flat, offset, size = self._zero.grad_position[self._zero.get_param_id(parameter)]
                start = self.ranks.rank * size
                stop = min(start + size, parameter.ds_numel)  # type: ignore[attr-defined]
                if stop > start:
                    pieces.append(Piece(name, start, stop, flat, offset))
            return pieces
        for flat, group in enumerate(self._zero.bit16_groups):
            for parameter in group:
                mapping = parameter._hp_mapping
                if mapping is not None:
                    own, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                    pieces.append(Piece(names[parameter], own.start, own.start + own.numel, flat, there.start))
        return pieces

    def _allocate(self) -> None:
        """Create the optimizer states: moments zero, averages equal to the weights."""
        for flat in self._flats:
            self._optimizer.begin(flat)
            for name in self._averages:
                self._optimizer.set_sliced(flat, name, flat.detach().clone())

    def _states(self, name: str) -> list[torch.Tensor]:
        return [self._optimizer.sliced(flat, name) for flat in self._flats]

    def _publish(self) -> None:
        """Copy the fp32 flat tensors to the module's weights."""
        if self.config.zero.stage < 3:
            self._zero.update_lp_params()
            return
        self._zero._partition_all_parameters()
        for group in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        persistent = self._zero.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)

    # ------------------------------------------------------------------------------- averages, checkpoints

    def _weights(self) -> list[torch.Tensor]:
        return self._flats

    def _average(self, index: int) -> list[torch.Tensor]:
        return self._states(state_name(index))

    def _new_snapshot(self) -> Snapshot:
        kinds = ("param", *self._names)
        flats = {kind: self._flats if kind == "param" else self._states(kind) for kind in kinds}
        whole: dict[str, torch.Tensor] = {}
        if self.ranks.is_main:
            whole = {f"buffer/{name}": buffer for name, buffer in saved_buffers(self.module)}
            for name, states in self._optimizer.whole_states().items():
                whole.update({f"{kind}/{name}": state for kind, state in states.items()})
        return ShardedSnapshot(flats, whole, self._host, self._assembler, self.ranks)

    @torch.no_grad()
    def import_tensors(self, read: Callable[[str], torch.Tensor], kinds: dict[str, str], updates: int) -> None:
        """See Engine."""
        self._settle()
        for name, buffer in saved_buffers(self.module):
            buffer.copy_(read(f"buffer/{name}"))
        scatter(lambda name: read(f"param/{name}"), self._pieces, self._flats)
        for kind in (kind for kind in kinds if kind in self._names):
            values = self._states(kind)
            if updates or kinds[kind] == "param":
                scatter(lambda name, kind=kind: read(f"{kinds[kind]}/{name}"), self._pieces, values)  # type: ignore[misc]
            else:
                torch._foreach_zero_(values)
            for flat, value in zip(self._flats, values, strict=True):
                self._optimizer.set_sliced(flat, kind, value)
        for name, states in self._optimizer.whole_states().items():
            for kind, state in states.items():
                state.copy_(read(f"{kinds[kind]}/{name}").view_as(state)) if updates else state.zero_()
        for flat in self._flats:
            self._optimizer.count(flat, updates)
        self.updates = updates
        self._publish()
