"""Turns a function into a program: `script CONFIG SAVE_PATH [--key=value ...]`.

argh builds the parser of the fixed arguments and their help. Overrides of config keys are split off
before, because a value may begin with `-`."""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import inspect
import io
import json
import logging
import os
import re
import sys
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from vegab import capture, execution, provenance, snapshot
from vegab import config as configs
from vegab.config import CONFIG_SUFFIXES, Config, ConfigRegistry, Draft, Key, Override
from vegab.execution import EXPLAINED, Func, Plugins, accompany, execute, one_line, say, script
from vegab.exits import FAILED, FINISHED, REFUSED, UsageError, leave
from vegab.files import ROOT
from vegab.plugins import MetaSaver, VegabPlugin
from vegab.run_folder import AlreadyFinished, RunFolder

try:
    import argh
except ModuleNotFoundError:
    # The commonest mistake of all, a shell without the environment, deserves a sentence.
    hint = "type make setup, then source .venv/bin/activate"
    say(f"{sys.executable} lacks argh, which the project needs; {hint}")
    sys.exit(REFUSED)

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
TAKEN_LETTERS = "bhlpP"
LIST_OF_TEXT = re.compile(r"(?:[\w.]+\.)?(?:list|List|Sequence|tuple|Tuple)\[str(?:, \.\.\.)?\]")
WRONG_VALUE = re.compile(r"argument (?:-., )?(?:--)?(\S+): invalid (int|float) value: '(.*)'")
FLAG = re.compile(r"--([^=]+)(?:=(.*))?", re.DOTALL)


def wrap(
    config_registry: ConfigRegistry | str | Path,
    func: Func,
    plugins: Plugins | None = None,
    *,
    prepare: Func | None = None,
    extendable: Iterable[str] = ("num_epochs", "num_steps"),
    short_flags: Mapping[str, str] = {},
    save_path_key: str = "",
    opens_folder: bool = True,
    follows: Callable[[], bool] | None = None,
    is_whole: Callable[[str], bool] = lambda path: True,
    rewrite: Callable[[list[str]], list[str]] = list,
    **fixed: Any,
) -> NoReturn:
    """Runs `func(config, save_path[, prepared][, **flags])` as a program, and ends the process.

    The registry's root, or what `add_schema` added, is the schema. Further parameters of `func`
    become flags, one of `list[str]` a flag that may be repeated; the first line of its docstring
    describes the program. One that takes the config only, `func(config, *, …)`, has no run folder.

    Args:
        config_registry: a registry, or a folder with `root.yaml`, for `config_from_folder`.
        func: the function, as above.
        plugins: called in their order; None: a MetaSaver, if there is a run folder.
        prepare: `prepare(config)` is called before the run folder is touched, also with `save_path`
            and the flags that it has parameters for. UsageError is a refusal; what it returns is
            a third argument of `func`.
        extendable: dotted keys that may grow in an existing run.
        short_flags: letters for flags, as {"n": "note"}: `-n TEXT` is `--note=TEXT`.
        save_path_key: a dotted key that may stand for SAVE_PATH, and is not kept in the config.
        opens_folder: if not, SAVE_PATH is not a run folder, and `func` is also given `dry_run`.
        follows: whether another process, with the same command, writes the run folder.
        is_whole: whether the folder of a finished run has all that it made; raises UsageError if
            even what the run could be continued from is lost.
        rewrite: returns the words of the command line in place of those that were typed.
        fixed: further arguments of `func`, which are then not flags."""
    if isinstance(config_registry, str | Path):
        config_registry = configs.config_from_folder(config_registry)
    registry = config_registry
    parameters = inspect.signature(func).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for name in fixed.keys() - {p.name for p in parameters}:
            raise TypeError(f"wrap() was given {name}, which {func.__name__} has no parameter for")
    has_folder = sum(p.kind in _POSITIONAL and p.name not in fixed for p in parameters) > 1
    told_plugins = ([MetaSaver()] if has_folder else []) if plugins is None else plugins

    def program(arguments: list[str]) -> int:
        arguments = rewrite(arguments)
        told = {} if opens_folder else _explanations(func)
        options = _options()
        several = functools.partial(options.add_argument, action="append", default=[])
        several("-b", "--base", metavar="FILE", help="a file that CONFIG overrides; repeatable")
        several("--delete", metavar="KEY", help="set a key back to its default; may be repeated")
        about = told.get("dry_run", "print the resolved config and its changes")
        options.add_argument("--dry_run", action="store_true", help=about)
        first = [p.name for p in parameters][: 1 + has_folder + (prepare is not None)]
        others = [*first, *fixed, *([] if opens_folder else ["dry_run"])]
        defaults = _add_flags(options, func, short_flags, others)
        keys = {key for schema in registry.schemas for key in schema.defaults}
        for name in sorted(keys & {option[2:] for option in options.known}):
            raise ValueError(f"the name '{name}' is taken by another flag; rename the key")
        usage = f"CONFIG {'SAVE_PATH ' * has_folder}[--key=value ...] [options]"
        parser = _parser(func, usage, options)
        parser.epilog = _HELP_ON_VALUES
        parser.tables = lambda: _tables_of(registry, arguments)
        add = parser.add_argument
        named = add("config", metavar="CONFIG", help="a named config, or a .yaml or .json file")
        named.completer = _completer(registry)  # type: ignore[attr-defined]
        if has_folder:
            about = told.get("save_path", "folder of the run: a new one, or its own")
            nargs = "?" if save_path_key else None
            add("save_path", metavar="SAVE_PATH", nargs=nargs, help=about)
        args, overrides, draft = _parse_twice(options, parser, arguments, registry)
        deleted = [Override(key, None, deletes=True) for key in args.delete]
        config = draft.resolve([*overrides, *deleted])
        if has_folder:
            config = _take_save_path(args, config, save_path_key)
        args.overrides = {}
        for key in map(draft.key_of, overrides):
            with contextlib.suppress(KeyError):  # --delete has taken it away
                args.overrides[key] = configs.lookup(config, key)
        args.resolved_config = copy.deepcopy(config)
        if args.dry_run and opens_folder:
            print(_as_yaml(config, configs.differences(draft.named(), config)))
            return FINISHED
        keywords = _tell(told_plugins, args, defaults)
        keywords |= fixed if opens_folder else {**fixed, "dry_run": args.dry_run}
        if not has_folder or not opens_folder:
            places = [args.save_path] if has_folder else []
            return _call_without_folder(functools.partial(func, config, *places, **keywords))
        folder = RunFolder(args.save_path, config, extendable, registry.completed, is_whole)
        if follows is not None and follows():
            return accompany(func, folder, keywords, prepare)
        return execute(func, folder, keywords, told_plugins, prepare)

    _exit(program)


main = wrap


def _take_save_path(args: argparse.Namespace, config: Config, key: str) -> Config:
    """Finds SAVE_PATH, perhaps at a key of the config, and returns the config without that."""
    found, typed = None, args.save_path
    with contextlib.suppress(KeyError):
        found, config = configs.lookup(config, key), configs.without(config, key)
    if not isinstance(found, str | None):
        raise UsageError(f"{key}: {configs.show(found)} was given, a folder is expected")
    if typed is None and found is None:
        missing = f"SAVE_PATH is missing; give the folder of the run, or -p {key} PATH"
        raise UsageError(f"{missing} (see --help)")
    if typed and found and os.path.abspath(typed) != os.path.abspath(found):
        raise UsageError(f"SAVE_PATH is {typed} and {key} is {found}; give one of them")
    args.save_path = found if typed is None else typed
    return config


def wrap_no_config_registry(
    func: Func, plugins: Plugins = (), *, short_flags: Mapping[str, str] = {}
) -> NoReturn:
    """Runs `func` as a program and ends the process.

    Parameters without a default are positional, those with one are flags `--name=value`, as for
    `wrap`; those of `list[str]` take several: words, or flags that are repeated. If one is called
    `save_path`, it is a run folder, and the others are its config."""

    def program(arguments: list[str]) -> int:
        parameters = inspect.signature(func).parameters.values()
        positionals = [p for p in parameters if p.default is p.empty and p.kind in _POSITIONAL]
        words = [p.name for p in positionals]
        options = _options()
        defaults = _add_flags(options, func, short_flags, words)
        parser = _parser(func, " ".join([*map(str.upper, words), "[options]"]), options)
        told = _explanations(func)
        for p in positionals:
            nargs = "+" if LIST_OF_TEXT.fullmatch(str(p.annotation)) else None
            about = told.get(p.name, "").replace("%", "%%")
            add = functools.partial(parser.add_argument, p.name, metavar=p.name.upper(), help=about)
            add(type=_type_of(p) or str, nargs=nargs)
        _complete(parser)
        args, _ = _parse(parser, arguments, {}, {}, options.known)
        given = {name: getattr(args, name) for name in words}
        keywords = given | {name: getattr(args, name) for name in defaults}
        args.overrides = {k: keywords[k] for k in defaults if keywords[k] != defaults[k]}
        args.resolved_config = {k: v for k, v in keywords.items() if k != "save_path"}
        args.save_path = keywords.get("save_path", "")
        _tell(plugins, args, defaults)
        if "save_path" in keywords:
            keywords["save_path"] = args.save_path

        def call(config: Config, *path: str) -> Any:
            return func(**config, **dict(zip(["save_path"], path, strict=False)))

        if not keywords.get("save_path"):
            return _call_without_folder(functools.partial(call, keywords))
        folder = RunFolder(str(keywords.pop("save_path")), keywords, (), defaults.__or__)
        return execute(call, folder, {}, plugins, None)

    _exit(program)


def wrap_commands(
    *commands: Func, explained: tuple[type[BaseException], ...] = (OSError,)
) -> NoReturn:
    """Makes a program of functions, one per subcommand, and ends the process.

    argh reads their parameters and the decorators `argh.arg`; a single one needs no name on the
    command line. `explained` are exceptions whose message says all: exit code 1, no traceback."""

    def program(arguments: list[str]) -> int:
        logging.basicConfig(level="INFO", format="%(message)s")
        description = commands[0].__globals__["__doc__"] or ""
        style = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
        parser = _CommandsParser(prog=script(), description=description, **style)
        if len(commands) == 1:
            argh.set_default_command(parser, commands[0])
        else:
            argh.add_commands(parser, list(commands), func_kwargs=style)
        _complete(parser)
        if not arguments and len(commands) > 1:
            parser.error("a command is needed")
        dispatch = functools.partial(argh.dispatch, parser, arguments, completion=False)
        return _call_without_folder(dispatch, explained)

    _exit(program)


def _exit(program: Callable[[list[str]], int]) -> NoReturn:
    """Ends the process with what the program returns; a UsageError becomes its sentence."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # no text is worth a crash
            stream.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:]
    try:
        snapshot.go_back(arguments)
        code = program(arguments)
        sys.stdout.flush()
    except UsageError as error:
        say(f"error: {one_line(error)}")
        code = REFUSED
    except AlreadyFinished as finished:
        execution.print_line(str(finished))
        code = FINISHED
    except BrokenPipeError:  # `script --help | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = FINISHED
    leave(code)


def _call_without_folder(
    func: Callable[[], Any], explained: tuple[type[BaseException], ...] = EXPLAINED
) -> int:
    try:
        func()
    except KeyboardInterrupt:
        say("interrupted")
        return 130  # as a shell says of a program that SIGINT ended
    except BrokenPipeError:
        raise
    except explained as error:
        say(f"failed: {one_line(error)}")
        return FAILED
    return FINISHED


# ------------------------------------------------------------------------ reading the command line

_Known = Mapping[str, tuple[str, bool]]
_Table = tuple[str, Iterable[tuple[str, str]]]  # its title, and names with what explains them
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class _Parser(argh.ArghParser):
    """A parser whose mistakes are UsageErrors, and whose help has tables made when needed."""

    tables: Callable[[], Iterable[_Table]] = tuple

    def __init__(self, **options: Any) -> None:
        self.known: dict[str, tuple[str, bool]] = {}  # of an option, its long name; has it a value?
        super().__init__(**options)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        action = super().add_argument(*names, **options)
        self.known |= dict.fromkeys(action.option_strings, (names[-1], action.nargs != 0))
        return action

    def error(self, message: str) -> NoReturn:
        if wrong := WRONG_VALUE.fullmatch(message):
            name, kind, value = wrong.groups()
            wanted = {"int": "an integer", "float": "a number"}[kind]
            raise UsageError(f"{name}: {value} was given, {wanted} is expected")
        if message.startswith("unrecognized") and "=" in message:
            message += "; each setting, and each value of a repeated flag, needs its own --"
        raise UsageError(f"{message} (see --help)")

    def format_help(self) -> str:
        for title, rows in self.tables():
            group = self.add_argument_group(title)
            for name, explanation in rows:
                group.add_argument("row", metavar=name, help=explanation.replace("%", "%%"))
        return super().format_help()


class _CommandsParser(_Parser):
    """Names flags like the parameters, without argh's hyphens and letters, except `-o`, and tells
    their defaults as `wrap` does."""

    def add_argument(self, *names: str, **options: Any) -> Any:
        if names[-1].startswith("--") and names[-1] != "--help":
            name = f"--{names[-1][2:].replace('-', '_')}"
            names = ("-o", name) if name == "--output" else (name,)
        if (default := options.get("default")) and default != argparse.SUPPRESS:
            options["help"] = f"{options.get('help', '')} ({default})".strip()
        return super().add_argument(*names, **options)


class _Version(argparse.Action):
    """Prints which project this is, and ends."""

    def __call__(self, *ignored: Any) -> NoReturn:
        import tomllib  # only here

        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        found = provenance.git_words("rev-parse", "--short", "HEAD")
        commit = f", commit {found}" if found else ""
        print(f"{project['name']} {project['version']}{commit}, Python {sys.version.split()[0]}")
        sys.exit()


def _completer(registry: ConfigRegistry) -> Callable[..., list[str]]:
    """Returns what has a shell complete CONFIG: by names, and by files as in all other places."""

    def find(prefix: str, **_: Any) -> list[str]:
        from argcomplete import FilesCompleter

        return [*registry.names(), *FilesCompleter()(prefix)]

    return find


def _complete(parser: argparse.ArgumentParser, keys: Iterable[str] = ()) -> None:
    """Answers a shell that asks what could be typed next, and ends; else does nothing."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        for key in keys:
            parser.add_argument(f"--{key}")
        argcomplete.autocomplete(parser)


def _options() -> _Parser:
    options = _Parser(add_help=False, allow_abbrev=False)
    options.add_argument("--version", action=_Version, nargs=0, help="print the project's version")
    add = functools.partial(options.add_argument, type=str.upper, choices=LEVELS, default="INFO")
    add("-l", "--log_level", metavar="LEVEL", help="DEBUG, INFO, WARNING, ERROR or CRITICAL")
    return options


def _parser(func: Func, usage: str, options: _Parser) -> _Parser:
    return _Parser(
        prog=script(),
        usage=f"%(prog)s {usage}",
        description=(inspect.getdoc(func) or "").split("\n", 1)[0],
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=30),
        allow_abbrev=False,
        parents=[options],
    )


def _parse_twice(
    options: _Parser, parser: _Parser, arguments: list[str], registry: ConfigRegistry
) -> tuple[argparse.Namespace, list[Override], Draft]:
    """As `_parse`, with the config before its overrides: which keys there are depends on it."""
    if "_ARGCOMPLETE" in os.environ:  # then the words are there, and nowhere else
        arguments = os.environ.get("COMP_LINE", "").split()
        draft = registry.draft(next(filter(registry.__contains__, arguments), None))
        _complete(parser, configs.flatten(draft.names))
    known = dict(ChainMap(*(schema.defaults for schema in registry.schemas)))
    # A first look, before it is known which keys are true or false.
    words, guessed = _split(arguments, known, known, options.known, is_strict=False)
    seen, others = options.parse_known_args(words)
    others = [word for word in others if not word.startswith("-")]
    if all(override.value is not None for override in guessed):
        del others[1:]  # else the first may be the value of an unknown key
    is_config = (word for word in others if word in registry or word.endswith(CONFIG_SUFFIXES))
    found = next(is_config, None), seen.base
    for _ in range(2):  # the first look may have found another CONFIG, or none
        draft = registry.draft(*found)
        args, overrides = _parse(parser, arguments, draft.names, draft.types, options.known)
        if found == (args.config, args.base):
            return args, overrides, draft
        path = getattr(args, "save_path", None)
        if path in registry and not (args.config in registry or os.path.isfile(args.config)):
            raise UsageError(f"CONFIG comes first: {script()} {path} {args.config}")
        found = args.config, args.base
    raise UsageError(f"it is not clear whether {args.config} is CONFIG; give CONFIG first")


def _parse(
    parser: _Parser, arguments: list[str], names: Config, types: Config, known: _Known
) -> tuple[argparse.Namespace, list[Override]]:
    """The fixed arguments and, apart from them, the overrides in the order they were given."""
    words, overrides = _split(arguments, names, types, known)
    args = parser.parse_args(words)
    args.argv = arguments
    _set_up_logging(args.log_level)
    return args, overrides


def _split(
    arguments: list[str], names: Config, types: Config, known: _Known, is_strict: bool = True
) -> tuple[list[str], list[Override]]:
    """The other arguments and the overrides, which argparse cannot read: `-1e-4` may be a value. If
    it is not strict, what follows an unknown key stays: it may be its value, or CONFIG."""
    for option in ("-h", "--help", "--version"):
        if option in arguments:
            return [option], []
    fixed: list[str] = []
    overrides: list[Override] = []
    waiting = list(reversed(arguments))
    # The options are here only to be found where one is misspelled.
    names = {**dict.fromkeys(long[2:] for long, _ in known.values()), **names}

    def is_bool(name: str) -> bool:
        with contextlib.suppress(UsageError, KeyError):
            return isinstance(configs.lookup(names, configs.find_key(names, name, types)), bool)
        return False

    def value_of(option: str) -> str:
        if not waiting and is_strict:
            raise UsageError(f"{option} needs a value")
        return waiting.pop() if waiting else ""

    while waiting:
        argument = waiting.pop()
        flag = FLAG.fullmatch(argument)
        option = argument.partition("=")[0]
        if argument == "--":
            return [*fixed, argument, *reversed(waiting)], overrides
        if argument in ("-p", "-P"):
            key = value_of(argument)
            value = value_of(f"{argument} {key}")
            overrides.append(Override(key, value, raw=argument == "-P", adds=True))
        elif option in known:
            long, has_value = known[option]
            text = flag[2] if flag else None
            if has_value and text is None:
                text = value_of(option)
            elif text is not None and not has_value:
                raise UsageError(f"{option} takes no value; {text} was given")
            is_dotted = is_strict and not flag and "." in str(text)
            with contextlib.suppress(configs.UnknownKeyError):
                if is_dotted and configs.find_key(names, str(text), types):
                    other = f"{text} is a key of the config: write -p {text} VALUE"
                    raise UsageError(f"{argument} is {long}, and {other}")
            fixed.append(f"{long}={text}" if has_value else long)
        elif not flag:
            fixed.append(argument)
        else:
            name, text = flag[1], flag[2]
            if text is None and is_bool(name):
                text = waiting.pop() if waiting[-1:] in (["true"], ["false"]) else "true"
            elif text is None and name.startswith("no_") and is_bool(name[3:]):
                name, text = name[3:], "false"
            else:
                try:
                    configs.find_key(names, name, types)
                    text = value_of(argument) if text is None else text
                except UsageError:
                    if is_strict:
                        raise
            overrides.append(Override(name, text))
    return fixed, overrides


def _set_up_logging(level: str) -> None:
    """Messages go to stdout as they are; warnings and errors to stderr with their level."""
    ordinary, serious = logging.StreamHandler(sys.stdout), logging.StreamHandler(sys.stderr)
    ordinary.addFilter(lambda record: record.levelno < logging.WARNING)
    serious.setLevel(logging.WARNING)
    serious.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=level, format="%(message)s", handlers=[ordinary, serious], force=True)
    if level == "DEBUG":
        capture.hidden = None


# -------------------------------------------------------------- flags from a function's parameters


def _add_flags(
    options: _Parser, func: Func, short_flags: Mapping[str, str], others: list[str]
) -> dict[str, Any]:
    """Adds an option for each parameter but the others, and returns their defaults by name. Raises
    ValueError if a letter is not free."""
    defaults: dict[str, Any] = {}
    told, letters = _explanations(func), {name: letter for letter, name in short_flags.items()}
    for p in inspect.signature(func).parameters.values():
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) or p.name in others:
            continue
        default = None if p.default is p.empty else p.default
        kind = _type_of(p) or (type(default) if isinstance(default, int | float | str) else None)
        names = [*(f"-{letters[n]}" for n in [p.name] if n in letters), f"--{p.name}"]
        about = told.get(p.name, "").replace("%", "%%")
        add: Any = functools.partial(options.add_argument, dest=p.name)
        if kind is bool:
            on, off = (argparse.SUPPRESS, about) if default else (about, argparse.SUPPRESS)
            add(*names, action="store_true", default=default, help=on)
            add(f"--no_{p.name}", action="store_false", default=default, help=off)
        elif LIST_OF_TEXT.fullmatch(str(p.annotation)):
            default = list(default or ())
            add(*names, action="append", default=default, metavar="TEXT", help=about)
        else:
            if default:
                about += f" ({configs.as_text(default)})".replace("%", "%%")
            read = kind or functools.partial(configs.read_value, default=default, key=p.name)
            metavar = {int: "N", float: "X", str: "TEXT"}.get(kind or object, "VALUE")
            required = p.default is p.empty
            add(*names, type=read, default=default, metavar=metavar, help=about, required=required)
        defaults[p.name] = default
    for letter, name in short_flags.items():
        is_letter = len(letter) == 1 and letter.isalpha() and letter not in TAKEN_LETTERS
        if not is_letter or name not in defaults:
            flags = f"a flag of the function: {', '.join(defaults)}"
            hint = f"give a letter, but none of {TAKEN_LETTERS}, for {flags}"
            raise ValueError(f"short_flags: '{letter}' was given for '{name}'; {hint}")
    return defaults


def _explanations(func: Func) -> dict[str, str]:
    """What the section `Args:` of a docstring says of each parameter."""
    _, _, section = (inspect.getdoc(func) or "").partition("Args:\n")
    found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section.split("\n\n")[0], re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def _type_of(parameter: inspect.Parameter) -> type | None:
    """The type that a parameter's annotation names, if it is one of a command line's."""
    annotation = parameter.annotation
    name = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    name = name.replace(" | None", "").replace("typing.Optional[", "").rstrip("]")
    return {"str": str, "int": int, "float": float, "bool": bool}.get(name)


def _tell(plugins: Iterable[VegabPlugin], args: Any, defaults: Config) -> Config:
    """Tells the plugins what was typed; returns the flags."""
    args.flags = {name: getattr(args, name) for name in defaults}
    args.given_flags = {k: value for k, value in args.flags.items() if value != defaults[k]}
    for plugin in plugins:
        plugin.on_parsed_args(args)
    return dict(args.flags)


# ------------------------------------------------------------------------------- --help, --dry_run


def _tables_of(registry: ConfigRegistry, arguments: Iterable[str]) -> Iterator[_Table]:
    """The keys of the config among the arguments; without one, all configs and all keys."""
    schemas, changes = registry.schemas, {}
    if name := next(filter(registry.__contains__, arguments), None):
        draft = registry.draft(name)
        schemas, changes = [draft.kind], configs.flatten(draft.named())
    else:
        yield "configs", [(name, registry.summary(name)) for name in registry.names()]
    for schema in schemas:
        sections: dict[str, list[tuple[str, str]]] = {}
        heading = schema.title or "keys and their defaults"
        for key, default in configs.flatten(schema.defaults).items():
            about = schema.keys.get(key, Key(default))
            row = (f"--{key}={configs.as_text(changes.get(key, default))}", about.help)
            heading = about.section or heading
            section = key.rpartition(".")[0]
            of_section = schema.keys.get(section, Key(None)).help
            title = ": ".join(filter(None, (section, of_section))) or heading
            sections.setdefault(title, []).append(row)
        yield from sections.items()


_HELP_ON_VALUES = """\
A value is YAML: 1e-4, true, null, text as it is typed, [1, 2] (or 1,2 where a list is expected),
{a: 1}, or @FILE, a file with the value. True and false may be written --key and --no_key. A nested
key is a.b, a/b, or only b while no other key ends in that. -p KEY VALUE is the same as
--KEY=VALUE; -P KEY TEXT takes TEXT as it is. If a key is given twice, the last value counts."""


def _as_yaml(config: Config, changes: dict[str, tuple[Any, Any]], indent: str = "") -> str:
    """A config as YAML with JSON for leaves, and a comment with what was changed."""
    lines = []
    for name, value in config.items():
        if isinstance(value, dict) and value:
            lines += [f"{indent}{configs.show(name)}:", _as_yaml(value, {}, indent + "  ")]
        else:
            lines.append(f"{indent}{configs.show(name)}: {json.dumps(value, ensure_ascii=False)}")
    if changes:
        lines += ["# differs from the named config:"]
        lines += [f"#   {configs.show_differences({key: pair})}" for key, pair in changes.items()]
    return "\n".join(lines)
