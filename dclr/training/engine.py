"""DeepSpeed: start the processes, wrap a network, step, save and resume. No other module imports deepspeed."""

import atexit
import importlib
import importlib.util
import json
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dclr import distributed
from dclr.config import OptimConfig
from dclr.errors import UserError, first_line
from dclr.training import batchnorm, checkpoint, connection

MOMENTUM = "momentum_buffer"
"""torch's name for SGD's state of a parameter."""

RANK_STATISTICS = "ranks/statistics"
"""Name of the tensor in a checkpoint that holds BatchNorm's statistics of every rank: (ranks, N) float32."""


SIXTEEN_BITS = ("fp16", "bf16", "bfloat16")
"""Sections of a DeepSpeed configuration that store parameters in 16 bits. The last one is an older name."""
EXPECTED = {"managed_gradient_accumulation": True, "gradient_allreduce_op": "mean"}
"""Settings of a DeepSpeed configuration that must keep their default. Another value would change the training."""
_ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ""}
"""Environment of a run of one process that no launcher started. The port is set to a free one."""


def choose_device() -> torch.device:
    """Return this process's device: the GPU whose number is LOCAL_RANK, or the CPU if there is no GPU.

    srun --gpus-per-task=1, and scripts that set CUDA_VISIBLE_DEVICES, show each process only its own GPU, as number 0.
    `machines.check_machines` refuses two processes on one GPU.

    Raises:
        UserError: LOCAL_RANK is not set, or the machine has several GPUs, but fewer than processes.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return torch.device("cpu")
    number, gpus = local_rank(), torch.cuda.device_count()
    if number >= gpus > 1:
        raise UserError(
            f"more processes than GPUs on {socket.gethostname()}: process {number}, counted from 0, finds {gpus} GPUs; "
            f"start at most {gpus} on each machine: deepspeed --num_gpus {gpus}, torchrun --nproc_per_node {gpus}, or "
            f"srun --ntasks-per-node={gpus}"
        )
    device = torch.device("cuda", number if gpus > 1 else 0)
    torch.cuda.set_device(device)
    return device


def start_processes() -> torch.device:
    """Join the run's other processes (see commands/launcher.py) and return this process's device.

    Raises:
        UserError: see choose_device; the processes cannot connect.
    """
    if not connection.several_processes():  # without these variables DeepSpeed looks for MPI
        alone = {**_ALONE, "MASTER_PORT": str(_free_port())}
        launched = "RANK" in os.environ
        os.environ.update({name: alone[name] for name in alone if not (launched and os.environ.get(name))})
    device = choose_device()
    deepspeed = import_deepspeed()
    if device.type == "cpu":
        distributed.share_cores()
    # DeepSpeed would compile a shared-memory kernel at its start: that takes minutes, and fails without a C++ compiler.
    # gloo does not need it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        with connection.connection_timeout() if connection.several_processes() else nullcontext():
            deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)
    except RuntimeError as error:
        raise connection.connection_error(error) from None
    return device


def stop_processes() -> None:
    """Leave the process group that `start_processes` joined.

    A process that is alone keeps its group until it ends, for further runs, such as those of a notebook: DeepSpeed
    holds the group in global variables and cannot start twice. Programs that it starts must not take part in the group.
    """
    if distributed.world_size() > 1:
        dist.destroy_process_group()
    elif dist.is_initialized():
        atexit.unregister(dist.destroy_process_group)
        atexit.register(dist.destroy_process_group)
        for name in _ALONE:
            os.environ.pop(name, None)


def local_rank() -> int:
    """Return this process's number among the run's processes on its machine.

    Raises:
        UserError: there are several processes, and the launcher did not set LOCAL_RANK.
    """
    if connection.several_processes() and "LOCAL_RANK" not in os.environ:
        raise UserError(
            "LOCAL_RANK is not set, but with several processes it must be the number of this process on its machine, "
            "from 0: start with deepspeed, torchrun or srun, which set it"
        )
    return int(os.environ.get("LOCAL_RANK", "0"))


def read_ds_config(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed configuration.

    Raises:
        UserError: the file is missing or not JSON; a section has a wrong type, sets what flags of train.py set, or asks
            for 16-bit parameters, float16 or ZeRO stage 3, or changes how gradients are accumulated or averaged.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"--ds_config {path}: {error.strerror}; ds_configs/ holds zero1.json, zero2.json and ddp.json"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--ds_config {path}: not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"--ds_config {path}: must hold a JSON object, as ds_configs/zero1.json does")
    for section in (*SIXTEEN_BITS, "torch_autocast", "zero_optimization"):
        if not isinstance(config.get(section, {}), dict):
            raise UserError(f"--ds_config {path}: {section} must be a JSON object, as in ds_configs/zero1.json")
    accumulation = config.get("gradient_accumulation_steps", 1)
    if not isinstance(accumulation, int) or accumulation < 1:
        raise UserError(
            f"--ds_config {path}: gradient_accumulation_steps is {accumulation!r}, but must be a whole number from 1"
        )
    for section in SIXTEEN_BITS:
        if config.get(section, {}).get("enabled"):
            raise UserError(
                f"--ds_config {path}: {section} stores parameters in 16 bits, "
                "which loses the key encoder's small updates; use torch_autocast"
            )
    if config.get("torch_autocast", {}).get("dtype", "bfloat16") != "bfloat16":
        raise UserError(
            f"--ds_config {path}: torch_autocast.dtype must be bfloat16: float16 needs a loss scale, and its normal "
            "overflows would stop the run here, as every non-finite gradient does"
        )
    for setting, value in EXPECTED.items():
        if config.get(setting, value) != value:
            raise UserError(f"--ds_config {path}: {setting} must be {json.dumps(value)}: remove it")
    for section in ("optimizer", "scheduler"):
        if section in config:
            raise UserError(
                f"--ds_config {path}: has a section {section}; remove it: --lr, --milestones, --momentum and "
                "--weight-decay set that"
            )
    for section in ("offload_optimizer", "offload_param"):
        if section in config.get("zero_optimization", {}):
            raise UserError(f"--ds_config {path}: {section} needs an optimizer of DeepSpeed: leave it out")
    if config.get("zero_optimization", {}).get("stage", 0) not in (0, 1, 2):
        raise UserError(
            f"--ds_config {path}: zero_optimization.stage must be 0, 1 or 2 (the key encoder reads whole parameters)"
        )
    return config


def resolve_precision(config: dict[str, Any], device: torch.device) -> str:
    """Turn `torch_autocast` off in `config` if the device has no fast bfloat16.

    Returns:
        One line that says which precision runs and why.
    """
    autocast = config.get("torch_autocast", {})
    if not autocast.get("enabled"):
        return "float32: torch_autocast is off in the DeepSpeed configuration"
    dtype = autocast.get("dtype", "bfloat16")
    if device.type == "cpu" and not any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_tile")):
        config["torch_autocast"] = {**autocast, "enabled": False}
        return (
            f"float32: this CPU has no fast {dtype} (neither AVX512-BF16 nor AMX); {dtype} would be 2 to 7 times slower"
        )
    return f"{dtype} compute, float32 parameters, statistics and loss (torch_autocast)"


class Engine:
    """A network under DeepSpeed with SGD.

    One optimizer step takes `optim.batch_size` samples, over all ranks and micro-batches.

    Attributes:
        module: the network.
        device: the network's device.
        sgd: torch's optimizer, which DeepSpeed wraps.
        accumulation: number of micro-batches in a step.
        micro_batch: number of samples in a micro-batch.

    Raises:
        UserError: see micro_batch_size; DeepSpeed refuses its configuration.
    """

    def __init__(self, module: nn.Module, ds_config: dict[str, Any], optim: OptimConfig, device: torch.device) -> None:
        deepspeed = import_deepspeed()
        config = dict(ds_config)
        self.device, self.optim = device, optim
        self.accumulation = int(config.get("gradient_accumulation_steps", 1))
        self.micro_batch = micro_batch_size(config, optim.batch_size)
        config["gradient_accumulation_steps"] = self.accumulation
        config["train_micro_batch_size_per_gpu"] = self.micro_batch
        config["train_batch_size"] = optim.batch_size
        module.to(device)
        for buffer in module.buffers():  # DeepSpeed broadcasts parameters only
            if distributed.world_size() > 1:
                dist.broadcast(buffer, src=0)
        trained = [p for p in module.parameters() if p.requires_grad]
        # Every ZeRO stage wraps this optimizer. Only a fused optimizer lets the device skip a step (nonfinite.py).
        self.sgd = torch.optim.SGD(
            trained, lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay, fused=True
        )
        try:
            self._engine, self._optimizer, *_ = deepspeed.initialize(
                model=module, optimizer=self.sgd, config=config, dist_init_required=False
            )
        # pydantic's errors are ValueErrors. DeepSpeed checks some settings by assertions.
        except (ValueError, AssertionError, deepspeed.DeepSpeedConfigError) as error:
            raise UserError(f"--ds_config: DeepSpeed refuses it: {' '.join(str(error).split())[:300]}") from None
        self.module: nn.Module = module
        # The momentum is created here and not in the first step: a checkpoint may be loaded into it before, and a
        # skipped first step would leave uninitialised memory. Under ZeRO the groups hold flat shards by now.
        for group in self.sgd.param_groups:
            for parameter in group["params"]:
                self.sgd.state[parameter][MOMENTUM] = torch.zeros_like(parameter)
        if self._sharded:
            self._optimizer._lazy_init_hp_params_optimizer_state()  # else DeepSpeed finds it only after its first step

    def __call__(self, *inputs: Any) -> Any:
        """Run the network's forward under the configured autocast."""
        return self._engine(*inputs)

    @property
    def view_dtype(self) -> torch.dtype:
        """The dtype of the network's input. It is bfloat16 where the first convolution rounds to it anyway."""
        bfloat16 = self._engine.torch_autocast_enabled() and self._engine.torch_autocast_dtype() == torch.bfloat16
        return torch.bfloat16 if bfloat16 else torch.float32

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Apply the configured autocast to calls that do not go through the network's forward."""
        enabled = self._engine.torch_autocast_enabled()
        dtype = self._engine.torch_autocast_dtype() if enabled else torch.bfloat16
        with torch.autocast(self.device.type, dtype=dtype, enabled=enabled):
            yield

    def train(self, mode: bool = True) -> None:
        """Set training or evaluation mode."""
        self._engine.train(mode)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch's loss ()."""
        self._engine.backward(loss)

    def step(self) -> None:
        """End a micro-batch. The optimizer steps after `accumulation` micro-batches."""
        self._engine.step()

    @property
    def overflowed(self) -> bool:
        """True if ZeRO itself skipped the last step for a non-finite gradient, which it checks if it clips."""
        return bool(getattr(self._optimizer, "overflow", False))

    def set_learning_rate(self, lr: float) -> None:
        """Set the learning rate of the next step."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def save(self, folder: Path, step: int, state: dict[str, Any], description: dict[str, str] | None = None) -> None:
        """Write a checkpoint of network and momentum. Both are stored whole, even if ZeRO shards them.

        Args:
            folder: where checkpoints are. See checkpoint.write.
            step: number of finished steps.
            state: anything that JSON can hold.
            description: the description of the network. See checkpoint.write.

        Raises:
            UserError: on all ranks, it cannot be written. Earlier checkpoints are intact.
        """
        ranks = batchnorm.gather_statistics(self.module)
        network = {**self.module.state_dict(), **batchnorm.name_statistics(self.module, ranks.mean(0))}
        tensors = {f"model/{name}": tensor for name, tensor in network.items()}
        tensors |= {f"momentum/{name}": tensor for name, tensor in self._momentum().items()}
        tensors[RANK_STATISTICS] = ranks

        def write() -> None:
            try:
                checkpoint.write(folder, step, tensors, {**state, "processes": distributed.world_size()}, description)
            except OSError as error:
                last = checkpoint.newest(folder)
                left = f"the last checkpoint, {last.name}, is intact" if last else "there is no checkpoint before it"
                raise UserError(
                    f"the checkpoint of step {step} cannot be written to {folder} ({error.strerror}): {left}; "
                    "free disk space or fix the folder's permissions, then use --resume"
                ) from None

        distributed.on_rank_zero(write)

    def resume(self, folder: Path, check: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
        """Load the newest checkpoint that rank 0 sees under `folder` into network and optimizer, and return its state.

        The state includes `step`. The run that wrote the checkpoint may have had another number of processes or another
        ZeRO stage. `check` gets the state before anything is loaded, and may raise UserError.

        Raises:
            UserError: on all ranks, there is no checkpoint, it is damaged, `check` refuses it, or it holds another
                network.
        """
        path = checkpoint.newest_for_all(folder)
        if path is None:
            raise UserError(f"--resume: {folder} holds no complete checkpoint to continue from")
        tensors, state = distributed.on_all_ranks(lambda: self._read(path, check))
        for name, parameter in self._trained.items():
            self._set_momentum(parameter, tensors[f"momentum/{name}"].to(self.device))
        if state["processes"] == distributed.world_size():
            batchnorm.set_statistics(self.module, tensors[RANK_STATISTICS][distributed.rank()].to(self.device))
        return state

    def _read(
        self, path: Path, check: Callable[[dict[str, Any]], None] | None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Load a checkpoint into the network. Return its tensors and its state."""
        tensors, state = checkpoint.read(path)
        if check is not None:
            check(state)
        expected = {f"momentum/{name}": p.shape for name, p in self._trained.items()}
        found = {name: tensor.shape for name, tensor in tensors.items() if name.startswith("momentum/")}
        try:
            if found != expected:
                raise RuntimeError(_difference(expected, found))
            if tensors[RANK_STATISTICS].shape != (state["processes"], batchnorm.count_statistics(self.module)):
                raise RuntimeError("its batch statistics belong to other layers")
            self.module.load_state_dict(
                {name.removeprefix("model/"): t for name, t in tensors.items() if name.startswith("model/")}
            )
        except (RuntimeError, KeyError) as error:
            raise UserError(f"--resume: {path} holds another network ({first_line(error)})") from None
        return tensors, state

    @property
    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    @property
    def _sharded(self) -> bool:
        return bool(self._engine.zero_optimization())

    def _momentum(self) -> dict[str, Tensor]:
        """Return the whole momentum by parameter name, on all ranks."""
        from deepspeed.utils import safe_get_full_optimizer_state

        if self._sharded:
            return {name: safe_get_full_optimizer_state(p, MOMENTUM) for name, p in self._trained.items()}
        return {name: self.sgd.state[p][MOMENTUM] for name, p in self._trained.items()}

    def _set_momentum(self, parameter: nn.Parameter, momentum: Tensor) -> None:
        """Set a parameter's momentum, and its value in the copy that ZeRO keeps."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if self._sharded:
            safe_set_full_fp32_param(parameter, parameter.detach())
            safe_set_full_optimizer_state(parameter, momentum, MOMENTUM)
        else:
            self.sgd.state[parameter][MOMENTUM].copy_(momentum)


def _difference(expected: dict[str, torch.Size], found: dict[str, torch.Size]) -> str:
    """Return how the shapes of a checkpoint's momentum differ from those of the network, by name."""
    name = next(name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name))
    there, here = ("x".join(map(str, of[name])) if name in of else "absent" for of in (found, expected))
    return f"{name.removeprefix('momentum/')} is {there} there, and {here} in the network of these settings"


def micro_batch_size(ds_config: dict[str, Any], batch_size: int) -> int:
    """Return the number of samples in a micro-batch: batch_size / (ranks * gradient_accumulation_steps).

    Raises:
        UserError: the division leaves a remainder, or `ds_config` names another batch size.
    """
    ranks, accumulation = distributed.world_size(), int(ds_config.get("gradient_accumulation_steps", 1))
    if batch_size % (ranks * accumulation):
        raise UserError(
            f"--batch-size is {batch_size}, but must be a multiple of {ranks * accumulation} "
            f"({ranks} processes x {accumulation} accumulation steps)"
        )
    micro = batch_size // (ranks * accumulation)
    for name, ours in (("train_batch_size", batch_size), ("train_micro_batch_size_per_gpu", micro)):
        given = ds_config.get(name, "auto")
        if given not in ("auto", ours):
            raise UserError(f"--ds_config: {name} is {given}, but --batch-size makes it {ours}; leave it out or 'auto'")
    return micro


def import_deepspeed() -> Any:
    """Import deepspeed late, because the import takes seconds, and quiet, because it prints many progress messages."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError("training needs the package deepspeed, which is not installed: pip install 'dclr[train]'")
    import deepspeed

    # Every start of DeepSpeed imports its optimizer Muon, and that import loads torch's compiler. It takes 1.5 s.
    # Runs use torch's SGD, so Muon may stay uncompiled.
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        with suppress(ImportError):
            importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        del os.environ["TORCHDYNAMO_DISABLE"]
        if before is not None:
            os.environ["TORCHDYNAMO_DISABLE"] = before

    # It warns that ZeRO is not tested with SGD. Our tests compare ZeRO's steps with plain torch's.
    deepspeed.utils.logger.setLevel(logging.ERROR)
    return deepspeed


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
