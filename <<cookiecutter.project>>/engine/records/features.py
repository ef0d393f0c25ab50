"""Parses what a record holds, by name: features of TensorFlow, and images.

A map of features has names as keys, and as values features of `tf.io`, the ones from here, or
mappings with `type` (or `module_path` and `class_type`) and the arguments of that class, such as
`{type: FixedLenFeature, shape: [1], dtype: int64}`."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from engine.batches import require_at_least
from vegab import UsageError, resolve

Features = dict[str, Any]
# What a tf.train.Example can hold, by its own words.
DTYPES = {"int64_list": "int64", "float_list": "float32", "bytes_list": "string"}
DECODE_FORMATS = ("auto", "jpeg", "png", "gif", "bmp")


class Decoded:
    """What stands in a record as one string; inherit from it for a type of your own."""

    def __repr__(self) -> str:  # without an address: a digest is made of it
        return f"{type(self).__qualname__}({vars(self)})"

    def decode(self, contents: tf.Tensor, num_parallel: int) -> tf.Tensor:
        """Return the arrays, (batch, ...), of strings, (batch,); runs in a graph."""
        raise NotImplementedError


@dataclass(frozen=True)
class ImageFeature(Decoded):
    """An encoded image.

    It becomes an array (height, width, channels), or (frames, height, width, channels) where
    `decode_format` is "gif"; "auto" takes the first frame. A batch needs images of one size."""

    resize_height: int | None = None  # pixels, bilinear; goes with `resize_width`
    resize_width: int | None = None
    channels: int = 3  # 1 (grey), 3 (red, green, blue), or 0: as many as the image has
    decode_format: str = "auto"  # which looks at the image; see DECODE_FORMATS
    enforced_dtype: Any = "float32"  # floats are in [0, 1], integers fill their range; None: uint8
    standard_scaling: bool = False  # scale to [-1, 1], which needs floats
    post_op: Callable[[tf.Tensor], tf.Tensor] | None = None  # called in a graph with the image

    def __post_init__(self) -> None:
        size = {"resize_height": self.resize_height, "resize_width": self.resize_width}
        given = {name: side for name, side in size.items() if side is not None}
        if len(given) == 1:
            raise ValueError("resize_height and resize_width go together; one of them is missing")
        require_at_least(1, **given)
        if self.channels not in (0, 1, 3):
            raise ValueError(f"channels is {self.channels}; expected 0, 1 or 3")
        if self.decode_format not in DECODE_FORMATS:
            expected = ", ".join(DECODE_FORMATS)
            raise ValueError(f"decode_format is {self.decode_format!r}; expected {expected}")
        if self.enforced_dtype is not None:
            object.__setattr__(self, "enforced_dtype", _dtype(self.enforced_dtype).name)
        if self.standard_scaling and "float" not in (self.enforced_dtype or ""):
            raise ValueError(f"standard_scaling needs floats, not {self.enforced_dtype}")

    def decode(self, contents: tf.Tensor, num_parallel: int) -> tf.Tensor:
        text = [tf.TensorSpec([], tf.string)]
        compiled = tf.function(self._decode_one, input_signature=text, autograph=False)
        one = compiled.get_concrete_function()
        spec = tf.TensorSpec(one.structured_outputs.shape, one.structured_outputs.dtype)
        return tf.map_fn(one, contents, fn_output_signature=spec, parallel_iterations=num_parallel)

    def _decode_one(self, content: tf.Tensor) -> tf.Tensor:
        image = self._decode_bytes(content)
        if self.enforced_dtype is not None:
            image = tf.image.convert_image_dtype(image, self.enforced_dtype, saturate=True)
        if self.resize_height is not None:
            resized = tf.image.resize(image, [self.resize_height, self.resize_width])
            if image.dtype.is_integer:
                resized = tf.round(resized)
            image = tf.saturate_cast(resized, image.dtype)
        if self.standard_scaling:
            image = (image - 0.5) * 2
        return image if self.post_op is None else self.post_op(image)

    def _decode_bytes(self, content: tf.Tensor) -> tf.Tensor:
        # TensorFlow makes a JPEG or PNG grey while it decodes it, and refuses to do so with others.
        if self.decode_format != "auto":
            decode = getattr(tf.io, f"decode_{self.decode_format}")
            if self.decode_format in ("jpeg", "png"):
                return decode(content, channels=self.channels)
            return _with_channels(decode(content), self.channels)
        decode = functools.partial(tf.io.decode_image, content, expand_animations=False)
        image = tf.cond(
            tf.strings.regex_full_match(tf.strings.substr(content, 0, 3), "GIF|BM(?s:.)"),
            lambda: _with_channels(decode(), self.channels),
            lambda: decode(channels=self.channels),
        )
        image.set_shape([None, None, self.channels or None])
        return image


def make_features(entries: Mapping[str, Any], where: str) -> Features:
    """Return a map whose values are features; ValueError, naming `where`, if one cannot be made.
    An entry `module_path` that is text is the one of each feature that has a `class_type`."""
    if isinstance(entries, Mapping) and isinstance(module := entries.get("module_path"), str):
        entries = {
            name: {"module_path": module, **entry} if isinstance(entry, Mapping) else entry
            for name, entry in entries.items()
            if name != "module_path"
        }
    if not isinstance(entries, Mapping) or not entries:
        raise ValueError(f"{where} is {entries!r}; expected names and features, at least one")
    classes = {name: getattr(tf.io, name) for name in dir(tf.io) if name.endswith("Feature")}
    classes = {ImageFeature.__name__: ImageFeature} | classes
    features = {str(n): _make(entry, f"{where}.{n}", classes) for n, entry in entries.items()}
    for name, feature in features.items():
        dtype = "string" if isinstance(feature, Decoded) else _dtype(feature.dtype).name
        if dtype not in DTYPES.values():
            known = ", ".join(DTYPES.values())
            raise ValueError(f"{where}.{name}: dtype is {dtype}; a record holds {known}")
    return features


def class_in(entry: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """Return the name of the class in a mapping, and its arguments; UsageError without a name."""
    arguments = dict(entry)
    keys = ("type", "module_path", "class_type")
    name, module_path, class_type = (arguments.pop(key, None) for key in keys)
    if name is None:
        name = f"{module_path}:{class_type}" if module_path else class_type
    if not isinstance(name, str):
        raise UsageError(f"{where} has no type; give `type`, or `module_path` and `class_type`")
    return name, arguments


class Parser:
    """Makes arrays of serialized `tf.train.Example`s, decoding `num_parallel` images at a time."""

    def __init__(self, features: Features, labels: Features | None, num_parallel: int) -> None:
        self.features, self.labels, self.num_parallel = features, labels, num_parallel
        self.maps = {"features_map": features} | ({"labels_map": labels} if labels else {})

    def parse(self, serialized: tf.Tensor) -> Any:
        """Return features, or (features, labels), of strings of shape (batch,); runs in a graph."""
        features, labels = stored(self.features), stored(self.labels or {})
        values = tf.io.parse_example(serialized, labels | features)
        first = self._dense(self.features, values)
        if self.labels is None:
            return first
        # One pass over the records parses both maps, unless they read a name in different ways.
        if any(repr(labels[name]) != repr(features[name]) for name in labels.keys() & features):
            values = tf.io.parse_example(serialized, labels)
        return first, self._dense(self.labels, values)

    def _dense(self, features: Features, values: Mapping[str, Any]) -> dict[str, tf.Tensor]:
        dense = {name: values[name] for name in features}
        for name, value in dense.items():
            if isinstance(feature := features[name], Decoded):
                dense[name] = feature.decode(value, self.num_parallel)
            elif isinstance(value, tf.sparse.SparseTensor):
                dense[name] = tf.sparse.to_dense(value)
            elif isinstance(value, tf.RaggedTensor):
                dense[name] = value.to_tensor()
        return dense

    def missing(self, found: set[str]) -> dict[str, str]:
        """Return the names in a record that are not among `found`, and the maps that name them."""
        return {
            key: where
            for where, features in self.maps.items()
            for name, feature in features.items()
            if (key := getattr(feature, "value_key", None) or name) not in found
            if getattr(feature, "default_value", None) is None
        }

    def fault(self, serialized: bytes) -> str | None:
        """Return what is wrong with a record, to be read after its name, or None."""
        try:
            held = held_in(serialized)
        except ValueError:
            return "is not a tf.train.Example"
        for where, features in self.maps.items():
            for name, feature in features.items():
                if fault := _fault(name, feature, held, where):
                    return fault
        try:
            self.parse(tf.constant([serialized]))
        except (tf.errors.InvalidArgumentError, ValueError) as error:
            return f"cannot be decoded: {first_line(error)}"
        return None


def stored(features: Features) -> Features:
    """Return the features as TensorFlow parses them: what is decoded, as strings."""
    string = tf.io.FixedLenFeature([], tf.string)
    return {k: string if isinstance(each, Decoded) else each for k, each in features.items()}


def held_in(serialized: bytes) -> dict[str, tuple[str, Sequence[Any]]]:
    """Return dtype, if any, and values of each feature in an Example; ValueError if it is none."""
    try:
        features = tf.train.Example.FromString(serialized).features.feature
    except Exception as error:  # protobuf's own class has no public name that all versions share
        raise ValueError("not a tf.train.Example") from error
    held = {}
    for name, value in features.items():
        kind = value.WhichOneof("kind")
        held[name] = DTYPES.get(kind, ""), getattr(value, kind).value if kind else ()
    return held


def described(features: Features | None) -> str:
    """Return a map of features as text, the same in every process."""
    lines = []
    for name, feature in sorted((features or {}).items()):
        post_op = getattr(feature, "post_op", None)
        text = repr(feature).replace(repr(post_op), getattr(post_op, "__qualname__", "post_op"))
        lines.append(f"{name}: {text}")
    return "\n".join(lines)


def first_line(error: Exception) -> str:
    """Return what TensorFlow says in an error, without the name of the operation."""
    text = getattr(error, "message", None) or str(error)
    return text.strip().splitlines()[0].rpartition("}} ")[2].partition(" [Op:")[0]


def _make(entry: Any, where: str, classes: Mapping[str, type]) -> Any:
    """Return a feature, or a partition of a ragged one."""
    kinds = (Decoded, *classes.values())
    if isinstance(entry, kinds):
        return entry
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where} is {entry!r}; expected a feature: its type and arguments")
    try:
        name, arguments = class_in(entry, where)
        path, _, bare = name.replace(":", ".").rpartition(".")
        is_known = path.partition(".")[0] in ("", "tf", "tensorflow")
        made = resolve(bare if is_known else f"{path}:{bare}", where, classes)
    except UsageError as error:
        raise ValueError(str(error)) from error
    if not (isinstance(made, type) and issubclass(made, kinds)):
        known = f"{', '.join(classes)}, or inherit from engine.records.features.Decoded"
        raise ValueError(f"{where}: {name} is not a type of feature; take one of {known}")
    try:
        if isinstance(arguments.get("post_op"), str):
            arguments["post_op"] = resolve(arguments["post_op"], f"{where}.post_op")
        for key in arguments.keys() & {"dtype", "row_splits_dtype"}:
            arguments[key] = _dtype(arguments[key])
        if parts := arguments.get("partitions"):
            nested = vars(tf.io.RaggedFeature).items()
            partitions = {name: kind for name, kind in nested if isinstance(kind, type)}
            arguments["partitions"] = [_make(part, "partitions", partitions) for part in parts]
        return made(**arguments)
    except (TypeError, ValueError, tf.errors.InvalidArgumentError) as error:
        text = str(error).replace("__new__() ", "").replace("__init__() ", "")
        raise ValueError(f"{where}: {made.__name__}: {text}") from error


def _dtype(dtype: Any) -> tf.DType:
    try:
        return tf.dtypes.as_dtype(dtype)
    except TypeError as error:
        raise ValueError(f"there is no dtype {dtype!r}") from error


def _with_channels(image: tf.Tensor, channels: int) -> tf.Tensor:
    """Return an image of 1, 3 or 4 channels with 1 or 3; 0: as it is."""
    if channels == 0:
        return image
    # A grey image's only channel is repeated, and the fourth one, transparency, left out.
    coloured = tf.repeat(image, tf.where(tf.shape(image)[-1] < 3, 3, 1), axis=-1)[..., :3]
    coloured = tf.ensure_shape(coloured, [*image.shape[:-1], 3])
    return coloured if channels == 3 else tf.image.rgb_to_grayscale(coloured)


def _fault(
    name: str, feature: Any, held: Mapping[str, tuple[str, Sequence[Any]]], where: str
) -> str | None:
    spec = stored({name: feature})[name]
    is_fixed = isinstance(spec, tf.io.FixedLenFeature)
    key = getattr(spec, "value_key", None) or name
    dtype, values = held.get(key, ("", ()))
    if not dtype:
        is_wrong = is_fixed and spec.default_value is None
        names = ", ".join(sorted(held)) or "nothing"
        return f"has no feature {key!r}, which {where} names; it has {names}" if is_wrong else None
    says = f"in feature {key!r}, but {where} says"
    if dtype != (wanted := _dtype(spec.dtype).name):
        return f"has {dtype} {says} {wanted}"
    shape = tf.TensorShape(spec.shape).as_list() if is_fixed else []
    if is_fixed and len(values) != math.prod(shape):
        return f"has {len(values)} values {says} shape {shape}"
    return None
