"""Names what EDflow knew and this project does not act on, and says what to do instead.

This is the one table of it. Whoever uses such a name is told before the first step: by a refusal
where results would differ, by a note where they would not.
"""

import logging
from collections.abc import Mapping
from typing import Any

from vegab import UsageError

log = logging.getLogger(__name__)

# Keys of a config, unless they are false or as EDflow itself writes them; refused.
KEYS = {
    "eval_functor": "write what it computes as eval_op of an iterator, and name that in an -e file",
    "eval_hook.eval_op": "eval_op is what is stored; give another split as --split to evaluate.py",
    "eval_op": "eval_op is what is stored; give another split as --split to evaluate.py",
    "fcond": "give the checkpoint to evaluate as --checkpoint, or all that were kept by eval_all",
}
# The same; noted.
NOTED_KEYS = {
    "ckpt_zero": "no checkpoint is kept before the first step; seed decides the initial weights",
    "code_root": "the source of the whole project is kept, in code.zip",
    "debug": "nothing is cut short; add --num_steps=10, or --max_batches_per_epoch=5",
    "error_on_timeout": "a batch is waited for, however long it takes",
    "gpu_mem_fraction": "set TF_FORCE_GPU_ALLOW_GROWTH=true in the environment",
    "gpu_mem_growth": "set TF_FORCE_GPU_ALLOW_GROWTH=true in the environment",
    "integrations.git": "meta.json names the commit, code.zip has what is not committed",
    "integrations.minimal_logging.image_format": "images are PNG files",
    "integrations.tensorboard.active": "tensorboard: true, the default, writes to tb/",
    "integrations.wandb.active": "see docs/trackers.md for a hook that tells Weights & Biases",
    "log_images_to_tensorboard": "images of log_op go to tb/ with tensorboard: true, the default",
    "n_prefetch": "batches are made ahead by n_data_processes",
    "nogpu": "add --gpus none to train on the CPU",
    "val_freq": "validation is after each epoch, as in EDflow, which did not read this either",
}
AS_WRITTEN = {
    "eval_hook.eval_op": "validation/eval_op",
    "eval_op": "step_ops/eval_op",
    "fcond": "lambda c: True",
    "integrations.minimal_logging.image_format": "png",
    "n_prefetch": 1,
}

# Methods and attributes that a subclass of an iterator defines, which nothing would read; refused.
DEFINITIONS = {
    "_iterate": "override iterate, and call super().iterate(batches) in it",
    "increment_global_step": "steps are counted by the loop; use a hook's after_step",
    "make_feeds": "change feeds in a hook's before_step, or examples in the dataset",
    "reset_global_step": "add -r to -c, which begins at step 0",
    "run_hooks": "hooks are called by the loop; append yours to self.hooks",
    "set_global_step": "the step is restored with the checkpoint",
}
OF_TRAINERS = {
    "create_train_op": "override make_loss_ops, make_optimizer(part) or train_op(model, **batch)",
    "get_checkpoint_variables": "all variables of model and iterator are saved",
    "get_img_ops": "use a TemplateIterator, whose log_op has images",
    "get_init_op": "do it in initialize(checkpoint_path)",
    "get_init_variables": "do it in initialize(checkpoint_path)",
    "get_log_ops": "return scalars from make_log_ops(model, **batch)",
    "get_restore_variables": "--warm_start and --warm_start_vars take some weights only",
    "get_trainable_variables": "override part_variables(part), which returns the same",
    "make_run_once_op": "do it in initialize(checkpoint_path), where checkpoint_path is None",
    "setup": "do it in __init__, after super().__init__(*args, **kwargs)",
    "slow_factor": "use a TFListTrainer, whose get_learning_rate_multiplier(index) scales the rate",
    "slow_keys": "use a TFListTrainer, whose get_learning_rate_multiplier(index) scales the rate",
}
# Attributes that EDflow gave an iterator, when they are read; refused.
ATTRIBUTES = {
    "bar_pos": "the loop draws its own progress bar",
    "ckpthook": "checkpoints are saved by the loop; ckpt_freq keeps more of them",
    "epoch_hooks": "append to self.hooks, whose after_epoch comes after validation",
    "evalhook": "callbacks are those of eval_callbacks in the config, or self.callbacks",
    "global_step": "use self.get_global_step()",
    "ihook": "log_freq and start_log_freq say when to log",
    "img_ops": "use a TemplateIterator, whose log_op has images",
    "log_ops": "return scalars from make_log_ops(model, **batch)",
    "loghook": "append a hook of your own to self.hooks, which reads last_results",
    "lr": "use self.learning_rate, or self.rate_at(step)",
    "opt_ops": "self.optimizers has the optimizers by part",
    "session": "there is no session: functions are compiled, and variables have values",
    "tensorboard_writer": "write with tf.summary.create_file_writer in a hook of your own",
    "train_placeholders": "make_loss_ops(model, **batch) is given the whole batch",
    "update_ops": "layers update themselves when they are called with training=True",
}
# Arguments of an iterator; noted.
ARGUMENTS = {
    "bar_position": "the loop draws its own progress bar",
    "desc": "the loop draws its own progress bar",
    "nogpu": NOTED_KEYS["nogpu"],
}

_OWN_LABELS = "write a DatasetMixin whose labels are np.load(path, mmap_mode='r') of its files"
_JOINED = "write a get_example(index) that joins examples of self.data, drawn by self.prng"
_CHECKPOINTS = "the loop saves and restores checkpoints; leave the hook out"
_DEFINED = "define it as an example in src/examples/iterators.py does, from Keras' datasets"
_TENSORS = "a TorchHookedModelIterator makes tensors of batches, and arrays of results"
_EVALUATED = "eval_op is stored by bin/evaluate.py, and after each epoch by a TemplateIterator"
# Last names of import paths that lead nowhere here; refused.
IMPORTS = {
    "SequenceDataset": "write a get_example(index) that returns a list of examples of self.data",
    "UnSequenceDataset": "write a get_example(index) that returns one of a sequence of self.data",
    "getSeqDataset": "write a get_example(index) that returns a list of examples of self.data",
    "ExampleConcatenatedDataset": "write a get_example(index) that returns one of each dataset",
    "DisjunctExampleConcatenatedDataset": "write a get_example(index) that merges one of each",
    "JoinedDataset": _JOINED,
    "RandomlyJoinedDataset": _JOINED,
    "DataFolder": "write a get_example(index) that reads the file",
    "LateLoadingDataset": "functions among the values of an example are called by any dataset",
    "CachedDataset": "keep what is slow to make in files that get_example reads",
    "PathCachedDataset": "keep what is slow to make in files that get_example reads",
    "cachable": "keep what is slow to make in files that get_example reads",
    "MetaDataset": _OWN_LABELS + "; StoredOutputs reads what an evaluation has stored",
    "MetaViewDataset": _OWN_LABELS,
    "EvalDataFolder": "StoredOutputs of engine.iterators reads what an evaluation has stored",
    "getDebugDataset": "use a SubDataset",
    "PRNGMixin": "any DatasetMixin has self.prng",
    **{
        name + split: _DEFINED
        for name in ("MNIST", "FashionMNIST", "CIFAR10", "CelebA")
        for split in ("", "Train", "Val", "Test")
    },
    "HookedModelIterator": "inherit from PyHookedModelIterator or TFHookedModelIterator",
    "BaseTrainer": "inherit from TFBaseTrainer",
    "TFMultiStageTrainer": "return {'train_op': self.turns()[stage]} from a TFFrequencyTrainer's "
    "step_ops(), where the stage goes by self.get_global_step()",
    "ExpandHook": "train_ops names the operations of a TemplateIterator that train",
    "LambdaCheckpointHook": _CHECKPOINTS,
    "CheckpointHook": _CHECKPOINTS,
    "PyCheckpointHook": _CHECKPOINTS,
    "RestoreModelHook": _CHECKPOINTS,
    "RestorePytorchModelHook": _CHECKPOINTS,
    "RestoreTFModelHook": _CHECKPOINTS,
    "RestoreCurrentCheckpointHook": _CHECKPOINTS,
    "RetrainHook": "add -r to -c, which begins at step 0",
    "WaitForManager": "eval_forever evaluates checkpoints as they come",
    "WaitForCheckpointHook": "eval_forever evaluates checkpoints as they come",
    "KeepBestCheckpoints": "monitor and ckpt_keep say which checkpoints are kept",
    "CollectorHook": _EVALUATED,
    "StoreArraysHook": _EVALUATED,
    "EvalHook": _EVALUATED,
    "TemplateEvalHook": _EVALUATED,
    "ImageOverviewHook": "use a LoggingHook, which saves the images of log_op as a grid",
    "PyLoggingHook": "use a LoggingHook",
    "MetricHook": "return metrics from the iterator's validate(batch)",
    "ToNumpyHook": _TENSORS,
    "ToTorchHook": _TENSORS,
    "ToFromTorchHook": _TENSORS,
    "DataPrepHook": _TENSORS,
    "RuntimeInputHook": "write a hook whose before_step reads the file",
    "get_logger": "use logging.getLogger(name), or an iterator's self.logger",
    "ProjectManager": "iterators and hooks have self.root, self.checkpoints, self.train, self.eval",
}


def check_keys(config: Mapping[str, Any]) -> None:
    """Note keys that nothing reads; UsageError for one without which results would differ."""
    for names in (KEYS, NOTED_KEYS):
        for name, instead in names.items():
            value: Any = config
            for part in name.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
            if value and value != AS_WRITTEN.get(name):
                told = f"{name} of EDflow's is not acted on: {instead}"
                if names is KEYS:
                    raise UsageError(told)
                log.warning("%s", told)


def check_arguments(owner: Any, arguments: Mapping[str, Any]) -> None:
    """Note arguments that nothing reads; TypeError for one that EDflow does not have either."""
    for name in arguments:
        if name not in ARGUMENTS:
            raise TypeError(f"{type(owner).__name__} has no argument {name!r}")
        if arguments[name]:
            log.warning("%s of EDflow's is not acted on: %s", name, ARGUMENTS[name])


def check_definitions(iterator: Any, names: Mapping[str, str]) -> None:
    """Raise a ValueError for what an iterator defines, and nothing calls or reads."""
    for name, instead in names.items():
        if name in vars(iterator) or hasattr(type(iterator), name):
            kind = type(iterator).__name__
            raise ValueError(f"{name} of {kind}, which EDflow reads, is not acted on: {instead}")


class NotHereError(UsageError, AttributeError):
    """An attribute of EDflow's iterators is read that those here do not have."""


def missing(iterator: Any, name: str) -> AttributeError:
    """Return the error for an attribute that an iterator does not have."""
    kind, known = type(iterator).__name__, DEFINITIONS | OF_TRAINERS | ATTRIBUTES
    if name in known:
        return NotHereError(f"{kind} has no {name}, as EDflow's have: {known[name]}")
    return AttributeError(f"{kind} has no attribute {name!r}")
