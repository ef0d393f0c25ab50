"""Named configs. `root` names every key with its default and its reason: it is the schema.

A named config says only what differs from root. Variants may also be YAML or JSON files in this
folder: `digits_wide.yaml` is the config `digits_wide`.
"""

from pathlib import Path

from vegab import ConfigRegistry, Key

registry = ConfigRegistry()

registry.set_root_config(
    {
        "dataset": Key("digits", "a name in src/data.py (digits, cifar10, cifar100) or a path"),
        "augmented": Key(True, "move (and, for photographs, mirror) training images at random"),
        "model": Key("simple_cnn", "a name in src/models.py, or an import path such as pkg.mod:f"),
        "n_filters": Key(32, "filters of the first block; each further block has twice as many"),
        "n_layers": Key(2, "blocks of convolution, normalisation and pooling"),
        "dropout": Key(0.2, "share of the classifier's inputs that is dropped in training"),
        "num_epochs": Key(20, "epochs in all; a larger number continues a finished run"),
        "batch_size": Key(32, "examples in a step"),
        "optimizer": Key("adam", "a Keras optimizer: adam, adamw, sgd, … or an import path"),
        "optimizer_arguments": Key({}, "its further arguments, such as {momentum: 0.9}"),
        "accumulate_steps": Key(1, "steps whose gradients are averaged before an update"),
        "learning_rate": Key(None, "one rate for all epochs; null: 0.001, or lr_schedule's"),
        "lr_schedule": Key(
            None, "[[until_epoch, rate], …], or {class: path of a Keras schedule, …}"
        ),
        "precision": Key("float32", "or mixed_bfloat16, mixed_float16, float64"),
        "deterministic": Key(
            True, "only operations that give the same bits; may cost time on a GPU"
        ),
        "threads": Key(None, "of an operation; null: one a core; a small model is faster with 1"),
        "jit_compile": Key(False, "compile steps with XLA, for a GPU; needs --no_deterministic"),
        "seed": Key(0, "of initial weights, order of examples, augmentation and dropout"),
        "checkpoint_steps": Key(0, "commit every so many steps, beside each epoch's end; 0: never"),
        "checkpoint_seconds": Key(300.0, "commit after so many seconds of an epoch; 0: never"),
        "monitor": Key("val_loss", "column of history.csv that decides which epoch is the best"),
        "monitor_mode": Key("auto", "or min or max, whichever is better; auto goes by the name"),
        "patience": Key(0, "stop after so many epochs without a better one; 0: never"),
        "on_nan": Key("stop", "or continue, when the loss is not a number"),
        "callbacks": Key([], "Keras callbacks: [{class: import path, argument: value}, …]"),
        "tensorboard": Key(True, "write event files to tb/"),
    }
)

registry.register(
    "digits",
    {"num_epochs": 30, "lr_schedule": [[20, 0.003], [26, 0.0005], [30, 0.0001]], "threads": 1},
    help="the bundled digits: about 11 s on two cores, 98 to 99 % right on the test set",
)

registry.register(
    "cifar10",
    {
        "dataset": "cifar10",
        "n_layers": 3,
        "batch_size": 128,
        "num_epochs": 60,
        "lr_schedule": [[30, 0.001], [50, 0.0003], [60, 0.0001]],
    },
    help="60,000 photographs of 10 kinds of things, 170 MB to download",
)

registry.register(
    "cifar100",
    {
        "dataset": "cifar100",
        "n_filters": 64,
        "n_layers": 3,
        "batch_size": 128,
        "num_epochs": 80,
        "lr_schedule": [[40, 0.001], [65, 0.0003], [80, 0.0001]],
    },
    help="the same number of 100 kinds, 169 MB to download",
)

registry.add_folder(Path(__file__).parent)
