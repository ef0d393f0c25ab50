"""Names the configs. `root` has every key with its default and a description: it is the schema.

A named config says only what differs from root. Variants may also be YAML or JSON files in this
folder: `digits_wide.yaml` is the config `digits_wide`."""

from pathlib import Path

from vegab import ConfigRegistry, Key

registry = ConfigRegistry()
NUMBERS, SAVES = "numbers and randomness", "checkpoints and stopping"  # headings in --help

# What every config has.
COMMON = {
    "precision": Key("float32", "mixed_bfloat16, mixed_float16 or float64", section=NUMBERS),
    "deterministic": Key(True, "use only operations that always give the same bits"),
    "threads": Key(None, "threads per operation; null: one per core"),
    "seed": Key(0, "seed of all random draws"),
    "checkpoint_seconds": Key(300.0, "save a checkpoint every N seconds; 0: never", section=SAVES),
    "monitor_mode": Key("auto", "min or max; auto goes by the metric's name"),
    "patience": Key(0, "stop after N epochs without a new best; 0: never"),
    "on_nan": Key("stop", "stop or continue when a loss is not finite"),
    "callbacks": Key([], "Keras callbacks: [{class: path, …}, …]", section="callbacks and hooks"),
    "hooks": Key([], "hooks, as in src/hooks.py: [{class: path, …}, …]"),
    "tensorboard": Key(True, "write event files to tb/"),
}

ROOT = {
    "dataset": Key("digits", "a name in src/data.py, or an import path", section="data"),
    "num_folds": Key(0, "folds for cross-validation; 0: none"),
    "fold": Key(0, "the fold to validate on, counted from 0"),
    "augmented": Key(True, "move (and mirror) training images at random"),
    "model": Key("simple_cnn", "a name in src/models.py, or an import path", section="model"),
    "loss": Key(None, "replaces the model's loss: a name or import path"),
    "metrics": Key(None, "replace the model's metrics, such as [accuracy]"),
    "n_filters": Key(32, "filters of the first block"),
    "n_layers": Key(2, "blocks of convolution and pooling"),
    "dropout": Key(0.2, "dropout rate before the last layer"),
    "num_epochs": Key(20, "epochs in all; more continue a finished run", section="training"),
    "batch_size": Key(32, "examples per step"),
    "optimizer": Key("adam", "a Keras optimizer, or an import path"),
    "optimizer_arguments": Key({}, "the optimizer's arguments, such as {momentum: 0.9}"),
    "accumulate_steps": Key(1, "average the gradients of N steps"),
    "learning_rate": Key(None, "null: 0.001, or lr_schedule's", instead_of="lr_schedule"),
    "lr_schedule": Key(
        None, "[[until_epoch, rate], …], or {class: path, …}", instead_of="learning_rate"
    ),
    "fine_tune": Key(None, "train only weights whose path matches this regular expression"),
    "jit_compile": Key(False, "compile with XLA; needs --no_deterministic"),
    "checkpoint_steps": Key(0, "save a checkpoint every N steps; 0: never", section=SAVES),
    "monitor": Key("val_loss", "metric that decides which epoch is best; '': none"),
    **COMMON,
}
registry.set_root_config(ROOT)

# A config with an `iterator` is its own schema: these keys, and whatever else it says.
ITERATOR = {
    "iterator": Key("", "import path of the class that defines a step"),
    "model": Key(None, "import path of a class that takes the config; null: there is none"),
    "datasets": Key({}, "{train: import path, validation: import path}"),
    "dataset": Key(None, "import path, for training only"),
    "validation_dataset": Key(None, "import path, for validation; goes with dataset"),
    "batch_size": Key(None, "examples per step"),
    "test_batch_size": Key(None, "examples at a time in validation; null: batch_size"),
    "num_steps": Key(None, "steps in all; takes precedence over num_epochs"),
    "num_epochs": Key(None, "epochs in all"),
    "max_batches_per_epoch": Key(None, "end an epoch after N steps"),
    "n_data_processes": Key(0, "processes that make examples; 0: the training process does"),
    "fixed_example_indices": Key({}, "{train: [0, 1], validation: [0, 1]}; else drawn"),
    "hook_freq": Key(1, "the iterator's hooks act every N steps"),
    "log_freq": Key(1000, "log at steps 0, 2, 4, 8, …, later every N steps"),
    "start_log_freq": Key(1, "the number of steps between logs to begin with"),
    "ckpt_freq": Key(None, "keep a checkpoint every N steps"),
    "ckpt_keep": Key(5, "how many of them: the best by monitor, or the latest"),
    "test_mode": Key(False, "true in evaluation: no dropout"),
    "eval_callbacks": Key({}, "{name: import path}, called with the stored outputs"),
    "callback_kwargs": Key({}, "{name: {argument: value}} for eval_callbacks"),
    "monitor": Key(None, "column of history.csv that decides which epoch is the best"),
    **COMMON,
}
required = [("iterator",), ("datasets", "dataset"), ("batch_size",), ("num_steps", "num_epochs")]
registry.add_schema(ITERATOR, required, "keys of a config with an iterator")

# A config with `train`, Deephub's kind, is its own schema too.
VARIANT = {
    "model": Key({}, "{type: import path, …}: its class, and the arguments of that"),
    "train": {
        "train_feeder": Key({}, "{type: TFRecordExamplesFeeder, file_patterns: …, …}"),
        "eval_feeder": Key({}, "the same for validation; {}: there is none"),
        "epochs": Key(10, "passes over the data in all; more continue a finished run"),
        "save_checkpoint_steps": Key(None, "save a checkpoint also every N steps"),
        "save_checkpoint_secs": Key(None, "save a checkpoint also every N seconds"),
        "save_summary_steps": Key(100, "log and write for TensorBoard every N steps"),
        "validation_secs": Key(None, "validate at most every N seconds; null: each epoch"),
        "exporters": Key({}, "{name: {type: BestExporter, FinalExporter or BestCheckpointCopier}}"),
        "early_stopping_metric": Key(None, "loss or a metric, of validation if there is any"),
        "early_stopping_steps_without_decrease": Key(None, "stop after N steps without a decrease"),
        "early_stopping_steps_without_increase": Key(None, "the same, without an increase"),
        "early_stopping_min_steps": Key(1, "do not stop before step N"),
        "early_stopping_hook_run_every_steps": Key(None, "compare every N steps; null: each epoch"),
        "lr_schedule": Key(None, "{class: exponential, …}, or 0.1:1000:0.01; null: the model's"),
        "fine_tune": Key(None, "regular expression: train only weights whose path matches"),
        "warm_start_check_point": Key(None, "as --warm_start, which takes precedence"),
        "warm_start_variables_regex": Key(".*", "as --warm_start_vars"),
    },
    "monitor": Key(None, "column of history.csv that decides which epoch is the best; null: loss"),
    **COMMON,
}
required = [("model",), ("train",)]
registry.add_schema(VARIANT, required, "keys of a variant", closed=("train",), is_metayaml=True)

about = "the bundled digits: about 11 s on two cores, accuracy 98 to 99 % on the test set"
schedule = [[20, 0.003], [26, 0.0005], [30, 0.0001]]
registry.register("digits", {"num_epochs": 30, "lr_schedule": schedule, "threads": 1}, about)

registry.add_folder(Path(__file__).parent, besides=["slurm"])  # which is not a config
registry.add_folder(Path(__file__).parent / "variants")
