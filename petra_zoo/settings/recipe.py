"""Everything a recipe can say, with timm's names for what timm has too."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from petra_zoo.settings.augmentation import Augmentation
from petra_zoo.settings.length import check_length, check_patience
from petra_zoo.settings.types import (
    AtLeastOne,
    BadImagePolicy,
    Count,
    Every,
    LogTarget,
    Metric,
    NotNegative,
    Place,
    Positive,
    Probability,
    SaveInterval,
    Source,
    Stages,
    Threads,
    WeightPrediction,
    WireType,
)
from petra_zoo.settings.update import check_max_delay, choose_accumulation_steps, share_out
from petra_zoo.strict_json import Json

_TIMM_LR_BASE = 0.1
_FOR_ANY_DEVICE = ("backprop", "reversible")  # methods that need nothing of a device but what torch does anyway


class Recipe(Augmentation):
    """One training run: the network, the data, the method, the optimizer and its schedule.

    Attributes:
        model: The network: a name of `petra-zoo list`, or of one that you have registered with timm.
        pretrained: Start from the model's published weights, from those of a tag (`digits`), or from a checkpoint:
            `hf-hub:ORG/NAME`, `local-dir:DIR` or a run directory. The head is replaced where the classes differ.
        freeze: What is not trained, its batch-norm statistics included: `backbone` (all but the classifier), or parts
            by their names in the model, such as `[conv1, bn1, layer1]`.
        freeze_bn: All batch norms keep their scale and shift, and normalise with their running statistics.
        train_last: Only the classifier and so many layers in front of it are trained, counted as `layer_decay` counts
            them: a transformer's or a ResNet's blocks.
        lora_rank: Low-rank adapters (by `peft`) of this rank and the classifier are trained, and nothing else. They are
            merged into the weights of every model that is saved.
        lora_alpha: What adapters add is multiplied by alpha / rank; None: by 1.
        lora_dropout: Of what adapters are given.
        lora_targets: Layers that get adapters, by the ends of their names, such as `[qkv, fc1]`; None: all linear
            layers and ungrouped convolutions of the reversible blocks.
        model_kwargs: What else the network is made with, such as `{norm_layer: groupnorm1}`.
        drop, drop_path: Probabilities of dropout in front of the classifier, and of leaving out a block's branch.
        dataset: `digits`, `shapes`, `cifar10`, `folder`, one of timm's (`torch/...`, `hfds/...`), or your own.
        data_dir: Where its files are.
        dataset_download: Fetch it where it is not there.
        batch_size: Images per micro-batch; an update takes `accumulation_steps` of them. Never unknown: where
            `update_size` is set, this is what follows from it.
        update_size: Images per update, of all replicas together, in the place of `batch_size`.
        max_delay: Largest delay of the first stage, D_0 = 2 (stages - 1) / accumulation_steps, in updates. Together
            with `update_size` it chooses the smallest `accumulation_steps` that divides an update, and `batch_size`
            with it, whatever the method; alone, it refuses what is later.
        validation_batch_size: Images at a time in validation; null for `batch_size`.
        workers: Processes that read images; 0 for the training's own.
        on_bad_image: Stop at an image that cannot be read (`fail`), or put the next one in its place (`skip`).
        method: `petra`, its buffered ancestors `dsp` and `delayed`, `local`, or the exact `backprop` and `reversible`.
        stages: Into how many consecutive parts the network is cut.
        accumulation_steps: Micro-batches per update, k.
        weight_prediction: The weights of a stage's forward: those of its tick (`none`, the paper's PETRA), or
            extrapolated to the tick in which the head (`head`) or its own backward (`backward`) sees the micro-batch.
            Nothing changes where there is no delay.
        opt, momentum, weight_decay, opt_eps, opt_betas: The optimizer by timm's name, and what it takes.
        opt_kwargs: What else it takes.
        clip_grad: Largest norm of the gradients of a stage; null for any.
        layer_decay: Learning rate of a layer relative to the one above it, as in timm.
        loss: What is minimised: `cross_entropy`, `bce` (timm's), or a registered one (`petra_zoo.training.losses`).
            Validation always tells the cross-entropy.
        split: Units per stage, one entry per stage; null to let the engine balance them.
        last_stage: Whether the last stage keeps its graph (more memory) or recomputes (more work).
        data_parallel: Replicas of the pipeline, each with micro-batches of its own; an update takes
            `data_parallel` times as many images.
        balance: Costs that the partition goes by: `measured` on rank 0 (or read from `profile`), `operations` counted;
            `auto` measures where there are several processes. A measured partition is saved as `profile.json`.
        profile: A `profile.json` of an earlier run, to cut the network as it was cut.
        device_speed: Speed of each rank's device relative to each other.
        wire_up, wire_down: The type in which streams, and streams with gradients, travel between stages.
        link_timeout: Seconds that a message may take after the first ticks.
        cuda_graphs: Whether ticks that are all alike are replayed as CUDA graphs (`auto`: on a GPU, as far as it goes).
        sync_bn: Batch norms over all replicas (CUDA only, as torch has it), instead of each over its own.
        num_classes, img_size: Classes, and pixels of an image's side; null to take them from the data.
        in_chans: Channels of an image.
        mean, std: Normalisation of images scaled to 0..1, one value per channel; null for the data set's own.
        train_split, val_split: What a data set opened through timm calls its splits.
        val_fraction: The share of a `folder` without splits that is for validation: chosen by the images' names, so
            that none is trained on first, and validated on later because others came.
        sampler: `balanced` gives every class as many images of an epoch: some of a large one are left out, others each
            time; those of a small one are repeated, augmented anew. Null: every image once.
        class_weights: `balanced` weighs the classes in the loss inversely to their images, 1 on average; for losses
            that take weights. Null: all alike. Validation never weighs.
        lr: The highest learning rate; null for what `lr_base` gives.
        lr_base, lr_base_size: The learning rate that belongs to so many images per update; it grows with them.
        kd_model_name: Distil from this teacher: a run, `hf-hub:`, `local-dir:` or timm name with its trained weights.
            See `petra_zoo.training.distillation`.
        kd_temperature, task_loss_weight, distill_loss_weight: Of distillation, as in timm.
        coupling_epochs: Move the couplings of a converted network linearly to 1 by this epoch; 0 leaves them.
        sched, warmup_lr, min_lr, warmup_prefix, cooldown_epochs, decay_*: The schedule of the learning rate, as in
            `timm.scheduler.create_scheduler_v2`.
        epochs: How often every image is seen; null where `max_updates` says how long a run is.
        max_updates: Updates after which the run ends, in the middle of an epoch too, in the place of `epochs`; warm-up
            and cooldown are among them.
        patience: Validations in a row without a better `checkpoint_metric` (top1 where it is null) that end the run;
            null: none do.
        on_divergence: Whether a run ends whose loss rises far above what it began with and what guessing gives
            (`stop`), or goes on (`ignore`); seen where the log reads it.
        warmup_epochs: In which the learning rate grows, within `epochs`, or ahead of them with `warmup_prefix`.
        device: `cpu`, `cuda`, `cuda:N`, or `mps` (untested here, and for the exact methods alone); null or `auto`
            for the GPU where there is one.
        threads: Of each process, on the CPU; null: one where a micro-batch's forward takes less than 1e9 operations.
        amp, amp_dtype: Autocast, and its type; with `float16` micro-batches that overflow are left out, and counted.
        channels_last: The order in which images and weights lie in memory.
        deterministic: On a GPU, algorithms of cuDNN that give the same bits in every run, in one process as in many;
            else those that are the fastest for each shape.
        tf32: On a GPU, products of float32 numbers are rounded to TF32's ten bits.
        compile: Whether torch.compile compiles the blocks' branches, in training. The memory stays that of the method.
        streams: What carries the streams of a reversible network: `float32`, `bfloat16`, `fixed16` (a grid in 16 bits,
            whose inverse is exact at g = 1), or `auto`: float32, but where branches compute in bfloat16 a 16-bit kind,
            unless 0 < g < 1.
        on_nonfinite: What becomes of a micro-batch whose loss or gradient is infinite or not a number: it ends the run
            (`stop`), or is left out (`skip`), counted, of its window and of batch norms' statistics. None is ever
            applied.
        drift_every, drift_limit: Measure every so many micro-batches how far what a stage reconstructs is from what it
            received, and warn where its relative error is larger than at unchanged weights by more than the limit;
            null never measures.
        log_to: Where metrics.jsonl is shown, too: `tensorboard`, `wandb` (Weights & Biases), each with its own package.
        model_ema, model_ema_decay: Evaluate and save a moving average of the weights.
        seed: Of weights, order and augmentation.
        val_interval: Epochs between validations.
        log_interval: Updates between log lines.
        checkpoint_every: How often everything is saved that the run needs to go on after it has been ended: `1 epoch`,
            `500 ticks` (micro-batches), `10 minutes`; null never.
        keep_last, keep_best: How many of the newest of these checkpoints stay, and of the best by `checkpoint_metric`
            (top1 where it is null).
        checkpoint_metric: `loss`, `top1` or `top5` on the validation split: the run directory's model is the best by
            it, and RUN@last the last one. Null: the last one is the run's.
        output: The run directory, absent, empty, or of a run to go on with; null for `runs/` + the recipe's name and
            time.
    """

    model: str
    pretrained: bool | Source = False
    freeze: str | list[str] | None = None
    freeze_bn: bool = False
    train_last: AtLeastOne | None = None
    lora_rank: AtLeastOne | None = None
    lora_alpha: Positive | None = None
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    lora_targets: list[str] | None = None
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    drop: Probability = 0.0
    drop_path: Probability = 0.0

    dataset: str
    data_dir: Place | None = None
    dataset_download: bool = False
    train_split: str | None = None
    val_split: str | None = None
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    sampler: Literal["balanced"] | None = None
    class_weights: Literal["balanced"] | None = None
    num_classes: AtLeastOne | None = None
    img_size: AtLeastOne | None = None
    in_chans: Literal[1, 3] = 3
    mean: list[float] | None = None
    std: list[Positive] | None = None
    batch_size: AtLeastOne = 128
    update_size: AtLeastOne | None = None
    validation_batch_size: AtLeastOne | None = None
    workers: Count = 4
    on_bad_image: BadImagePolicy = "fail"
    on_nonfinite: Literal["stop", "skip"] = "stop"
    drift_every: AtLeastOne | None = None
    drift_limit: Positive = 0.5

    method: str = "petra"
    stages: Stages = 1
    split: list[AtLeastOne] | None = None
    accumulation_steps: AtLeastOne = 1
    max_delay: NotNegative | None = None
    last_stage: Literal["graph", "recompute"] = "graph"
    data_parallel: AtLeastOne = 1
    balance: Literal["auto", "measured", "operations"] = "auto"
    profile: Place | None = None
    device_speed: list[Positive] | None = None
    wire_up: WireType | None = None
    wire_down: WireType | None = None
    link_timeout: Positive = 60.0
    cuda_graphs: Literal["auto", "off"] = "auto"
    sync_bn: bool = False

    opt: str = "sgd"
    lr: Positive | None = None
    lr_base: Positive | None = None
    lr_base_size: AtLeastOne = 256
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: NotNegative = 2e-5
    opt_eps: Positive | None = None
    opt_betas: tuple[Probability, Probability] | None = None
    opt_kwargs: dict[str, Any] = Field(default_factory=dict)
    clip_grad: Positive | None = None
    weight_prediction: WeightPrediction = "none"
    layer_decay: Positive | None = None
    loss: str = "cross_entropy"

    kd_model_name: Source | None = None
    kd_temperature: Positive = 4.0
    task_loss_weight: NotNegative | None = None
    distill_loss_weight: NotNegative | None = None
    coupling_epochs: Count = 0

    sched: Literal["cosine", "tanh", "step", "constant", "multistep", "poly", "wsd", "rsqrt", "none"] = "cosine"
    epochs: AtLeastOne | None = 300
    max_updates: AtLeastOne | None = None
    patience: AtLeastOne | None = None
    on_divergence: Literal["stop", "ignore"] = "stop"
    warmup_epochs: Count = 5
    warmup_lr: NotNegative = 1e-5
    warmup_prefix: bool = False
    min_lr: NotNegative = 0.0
    decay_epochs: Positive | None = None
    decay_milestones: list[AtLeastOne] = Field(default=[90, 180, 270])
    decay_rate: Positive = 0.1
    cooldown_epochs: Count = 0

    device: str | None = None
    threads: Threads | None = None
    amp: bool = False
    amp_dtype: Literal["bfloat16", "float16"] = "bfloat16"
    streams: Literal["auto", "float32", "bfloat16", "fixed16"] = "auto"
    channels_last: bool = False
    deterministic: bool = False
    tf32: bool = True
    compile: bool = False
    model_ema: bool = False
    model_ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9998
    seed: Count = 42
    log_interval: AtLeastOne = 50
    val_interval: AtLeastOne = 1
    log_to: list[LogTarget] = Field(default_factory=list)
    checkpoint_every: Every | None = SaveInterval(1, "epochs")
    keep_last: AtLeastOne = 1
    keep_best: Count = 0
    checkpoint_metric: Metric | None = None
    output: Place | None = None

    @property
    def learning_rate(self) -> float:
        """The peak learning rate: `lr`, or `lr_base` (0.1 unless given) scaled linearly to the images per update."""
        if self.lr is not None:
            return self.lr
        return (self.lr_base or _TIMM_LR_BASE) * self.images_per_update / self.lr_base_size

    @property
    def images_per_update(self) -> int:
        """Of all replicas together."""
        return self.batch_size * self.accumulation_steps * self.data_parallel

    @property
    def delay(self) -> tuple[float, ...]:
        """D_j of every stage: how many updates old the gradients are that it applies."""
        from petra_zoo.petra.methods import find_method

        return find_method(self.method).delay(self.stages, self.accumulation_steps)

    @property
    def decided(self) -> tuple[str, ...]:
        """The settings that follow from `update_size` and `max_delay` and are not the recipe's to say."""
        if self.update_size is None:
            return ()
        return ("batch_size",) if self.max_delay is None else ("batch_size", "accumulation_steps")

    @property
    def epochs_beside(self) -> int:
        """Those of the cooldown, and of the warm-up where it comes on top."""
        return self.cooldown_epochs + (self.warmup_epochs if self.warmup_prefix else 0)

    @property
    def total_epochs(self) -> int | None:
        """With cooldown, and with the warm-up where it comes on top; None where `max_updates` says how long."""
        return None if self.epochs is None else self.epochs + self.epochs_beside

    @model_validator(mode="before")
    @classmethod
    def _null_says_nothing(cls, settings: dict[str, Json]) -> dict[str, Json]:
        """A saved recipe has null where a number followed from others: it follows again."""
        silent = {name for name in ("batch_size", "accumulation_steps") if settings.get(name, ...) is None}
        return {name: value for name, value in settings.items() if name not in silent}

    @model_serializer(mode="wrap", return_type=dict)
    def _what_follows_is_not_said(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Json]:
        said: dict[str, Json] = serialize(self)
        return {name: None if name in self.decided else value for name, value in said.items()}

    @field_validator("device")
    @classmethod
    def _device_is_known(cls, device: str | None) -> str | None:
        if device is not None and not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]+)?", device):
            raise ValueError("expected auto, cpu, cuda, cuda:N or mps")
        return None if device == "auto" else device

    @field_validator("method")
    @classmethod
    def _method_is_registered(cls, method: str) -> str:
        from petra_zoo.petra.methods import find_method  # with torch behind it: only where a recipe names one

        return find_method(method).name

    @field_validator("opt")
    @classmethod
    def _optimizer_is_timms(cls, opt: str) -> str:
        from timm.optim import list_optimizers  # with torch behind it: only where a recipe is used

        if opt.removeprefix("lookahead_") not in list_optimizers():
            raise ValueError("expected an optimizer that timm.optim.list_optimizers() names, such as sgd or adamw")
        return opt

    @field_validator("opt_kwargs")
    @classmethod
    def _what_has_a_setting_is_said_there(cls, options: dict[str, Json]) -> dict[str, Json]:
        for name in ("opt", "lr", "momentum", "weight_decay", "layer_decay"):
            if name in options:
                raise ValueError(f"{name} is a setting of its own: take it out, and say {name}={options[name]}")
        return options

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        if self.lr is not None and self.lr_base is not None:
            raise ValueError("lr and lr_base are both set; set one of them to null")
        if self.layer_decay is not None and self.sched == "none":
            raise ValueError("layer_decay has no effect with sched=none; use sched=constant")
        if self.device == "mps" and self.method not in _FOR_ANY_DEVICE:
            raise ValueError(f"device=mps is for the exact methods alone: set method={' or '.join(_FOR_ANY_DEVICE)}")
        if self.sampler and self.class_weights:
            raise ValueError("sampler and class_weights are both balanced: small classes count twice; set one to null")
        if self.amp_dtype == "float16" and not self.amp:
            raise ValueError("amp_dtype=float16 has no effect without autocast: set amp=true, too")
        if self.compile and self.sync_bn:
            raise ValueError("compile and sync_bn are both set: a synchronised norm cannot be compiled; unset one")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != self.in_chans:
                raise ValueError(f"{name}={values} has {len(values)} values; expected one per channel, {self.in_chans}")
        if self.split is not None and len(self.split) != self.stages:
            raise ValueError(
                f"split={self.split} has {len(self.split)} entries; expected one per stage, stages={self.stages}"
            )
        return self

    @model_validator(mode="after")
    def _length_is_known(self) -> Self:
        if self.max_updates is not None and "epochs" not in self.model_fields_set:
            object.__setattr__(self, "epochs", None)  # else it is frozen
        check_length(self.epochs, self.max_updates)
        check_patience(self.patience, self.val_interval, self.total_epochs)
        return self

    @model_validator(mode="after")
    def _one_way_to_freeze(self) -> Self:
        whole = {"train_last": self.train_last is not None, "lora_rank": self.lora_rank is not None}
        ways = [f"{name}={getattr(self, name)}" for name, asked in whole.items() if asked]
        if self.freeze is not None:
            ways.append(f"freeze={self.freeze}")
        if len(ways) > 1:
            raise ValueError(f"{ways[0]} says all of what is trained, and {ways[1]} says otherwise: take one out")
        for name, silent in (("lora_alpha", None), ("lora_dropout", 0.0), ("lora_targets", None)):
            if self.lora_rank is None and getattr(self, name) != silent:
                raise ValueError(f"{name}={getattr(self, name)} has no effect without adapters: set lora_rank, too")
        return self

    @model_validator(mode="after")
    def _update_is_known(self) -> Self:
        """Fills in what follows, so that nobody can read a number that does not hold."""
        size, most, k, replicas = self.update_size, self.max_delay, self.accumulation_steps, self.data_parallel
        if size is None:
            if most is not None:
                check_max_delay(most, self.stages, k, self.method, images_per_update=self.images_per_update)
            return self
        for name in self.decided:
            if name in self.model_fields_set:
                by = f"update_size={size}" + (f" and max_delay={most:g} choose" if most is not None else " chooses")
                instead = "update_size" if name == "batch_size" else "max_delay"
                raise ValueError(
                    f"{by} {' and '.join(self.decided)}, but {name}={getattr(self, name)} is set: leave {name} out, or "
                    f"set {instead}=null"
                )
        if most is not None:
            k = choose_accumulation_steps(size, most, self.stages, replicas, self.method)
        values = {"accumulation_steps": k, "batch_size": share_out(size, k, replicas)}
        for name, value in values.items():
            object.__setattr__(self, name, value)  # else it is frozen
        return self
