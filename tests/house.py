"""Static checks of the package's structure and English, on the syntax tree alone: `python -m tests.house [FOLDER]`.

Prints every violation as `path:line: [rule] what it is; what to do instead`, then a count by rule, and exits with 1 if
there is one.

How imports are counted, for cycles:

- Every import counts, wherever it is: under `if TYPE_CHECKING`, inside a function, and `import_module` of a literal.
- `from litdeploy.x import name` is an import of the submodule `litdeploy.x.name` if there is one. Otherwise it is an
  import of the module that defines `name`: where the `__init__` of a package only imports it, that import is followed.
- An import of a submodule is not counted as one of its parents' `__init__`, although Python runs them.

Prose is what docstrings, comments, string literals and templates hold. Strings that stand beside one another, and
comments on consecutive lines, are read as one text, so that a phrase is found across lines.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from bisect import bisect_right
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

MOST_FILE_LINES = 600
MOST_FUNCTION_LINES = 60  # without signature and docstring
MOST_PARAMETERS = 12

TASK_NAMES = {"translates", "TranslationInput", "Accuracy", "Likeness"}
KNOWS_TASKS = ("tasks/", "networks/families/", "config/spec.py", "storage/records.py")

# Pattern of a phrase → what to write instead. Words are whole, case is ignored unless the pattern says otherwise.
DIALECT = {
    r"(hold|holds|held|holding)(\s+[^\s.,;:]+){0,4}?\s+against": "compare with, check against",
    r"(go|goes|going|gone|went)\s+on\s+(with|from|where)": "resume, continue",
    r"told|tells|(?:not|cannot|to|must)\s+tell": "report, show, say",
    r"None\s+where": "None if",
    r"where\s+there\s+(is|are|was)": "if there is",
    r"whoever|somebody": "the user, the caller, another process",
    r"what\s+there\s+is": "name the thing",
    r"(?-i:Of\s+(?:a|an|the|what|its|each|all|\w+s)\b)": "start with the subject or a verb",
    r"(brings?|brought|bringing)\s+along": "include, contain",
    r"lets?\s+in": "accept, allow",
    r"(find|finds|found|finding)\s+out": "detect, determine",
    r"(?<!Triton\s)serves|(not|which|that)\s+serve": "work, suit, be valid",
    r"lies?(?=\s+(in|on|at|outside|inside|within|beside|between|below|above|where|there)\b)": "is",
    r"(?<!no\s)(?<!No\s)such(?!\s+as)": "this, of this kind",
    r"(go|goes|going|gone)\s+by": "use, follow, depend on",
    r"beside": "next to, in addition to",
    r"asked\s+for": "requested, given",
    r"(put|puts|putting)\s+back": "restore",
    r"as\s+(it\s+is|they\s+are|it\s+was|they\s+were)": "unchanged",
}
# Words of defined names that belong to that English, and names that the rebuild replaces.
DIALECT_WORDS = {"told", "tells", "whoever", "somebody"}
DIALECT_NAMES = {
    "Epochs": "EpochRunner",
    "Watch": "LossMonitor",
    "put_back": "restore",
    "take": "snapshot",
    "Ends": "ExportWrapper",
    "Feed": "InputAdapter",
    "told": "summary",
}
# British spellings. Flags and keys keep theirs: these words are let alone.
BRITISH = (
    r"(?:normal|recogn|initial|quant|synchron|serial|organ|minim|maxim|summar|general|random|memor|util|vector|parallel|"
    r"character|visual|optim|emphas|categor)is(?:e|es|ed|er|ers|ing|ation|ations|able)|tokenis(?:e|es|ed|er|ers|ing|ation)|"
    r"behaviours?|colou?rs?(?<!colors)(?<!color)|coloured|favours?|neighbours?|grey|centres?|licences?|modell(?:ed|ing)|"
    r"labell(?:ed|ing)|cancell(?:ed|ing)|learnt|analys(?:e|ed|ing)|artefacts?"
)
KEYS = {"normalise", "optimiser", "synchronised", "artefact", "artefacts", "neighbour", "quantised"}
# How the docstring of a function must not begin; the imperative does.
THIRD_PERSON = re.compile(
    r"(?:Add|Allow|Answer|Appli?e|Ask|Begin|Bring|Build|Call|Capture|Check|Choose|Close|Collect|Compare|Compile|Complete|"
    r"Compresse|Compute|Convert|Copie|Create|Cut|Decide|Decode|Divide|Draw|Drop|Emptie|End|Enter|Evaluate|Export|Fill|Find|"
    r"Fit|Fold|Follow|Freeze|Gather|Get|Give|Goe|Hold|Import|Initialise|Join|Judge|Keep|Launche|Lay|Let|List|Load|Look|"
    r"Make|Matche|Mean|Merge|Move|Normalise|Open|Pack|Parse|Pick|Print|Put|Raise|Read|Rebuild|Refill|Refuse|Remove|Render|"
    r"Repeat|Replace|Resolve|Restore|Return|Rewrite|Run|Save|Say|Search|Send|Set|Shift|Show|Sort|Split|Start|Stop|Strike|"
    r"Switche|Take|Tell|Train|Translate|Trie|Turn|Undoe|Unpack|Update|Use|Verifie|Wait|Walk|Warm|Warn|Wrap|Write|Yield)s\b"
)


@dataclass(frozen=True, order=True)
class Violation:
    """One broken rule: where, which, what it is, and what to do instead."""

    path: str
    line: int
    rule: str
    what: str
    instead: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: [{self.rule}] {self.what}; {self.instead}"


@dataclass(frozen=True)
class Import:
    """An import statement's target: a module, and the name taken from it, None for the module itself."""

    module: str
    name: str | None
    line: int


@dataclass
class Module:
    """One file of the package."""

    name: str
    path: Path
    inside: str  # path relative to the package's folder
    text: str
    tree: ast.Module
    imports: list[Import] = field(default_factory=list)
    bound: dict[str, Import] = field(default_factory=dict)  # names that are bound by an import, at module level
    defined: set[str] = field(default_factory=set)

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"


class House:
    """The package in a folder, read and parsed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.modules: dict[str, Module] = {}
        for path in sorted(root.rglob("*.py")):
            inside = path.relative_to(root).as_posix()
            parts = [root.name, *path.relative_to(root).with_suffix("").parts]
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            text = path.read_text(encoding="utf-8")
            module = Module(name, path, inside, text, ast.parse(text, str(path)))
            _read_names(module)
            self.modules[name] = module

    def shown(self, path: Path) -> str:
        return path.relative_to(self.root.parent).as_posix()

    def owner(self, found: Import, seen: frozenset[tuple[str, str]] = frozenset()) -> str | None:
        """The module that an import is one of; None if it is none of the package's."""
        if found.module not in self.modules:
            return None
        if found.name is None:
            return found.module
        if f"{found.module}.{found.name}" in self.modules:
            return f"{found.module}.{found.name}"
        module = self.modules[found.module]
        handed_on = module.bound.get(found.name)
        if not module.is_package or found.name in module.defined or handed_on is None:
            return found.module
        if (found.module, found.name) in seen:
            return found.module
        return self.owner(handed_on, seen | {(found.module, found.name)}) or found.module

    def edges(self) -> dict[str, dict[str, int]]:
        """Module → imported module → line of the first import."""
        edges: dict[str, dict[str, int]] = {name: {} for name in self.modules}
        for module in self.modules.values():
            for found in module.imports:
                owner = self.owner(found)
                if owner is not None and owner != module.name:
                    edges[module.name].setdefault(owner, found.line)
        return edges


def _read_names(module: Module) -> None:
    """Collect a module's imports, and the names that it defines or binds at its top level, also in an `if` or `try`."""
    for node in ast.walk(module.tree):
        module.imports += _imports_of(node, module)
    top: deque[ast.stmt] = deque(module.tree.body)
    while top:
        node = top.popleft()
        if isinstance(node, ast.If | ast.Try | ast.With):
            top.extend(child for child in ast.walk(node) if isinstance(child, ast.stmt) and child is not node)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            module.defined.add(node.name)
        elif isinstance(node, ast.Assign):
            module.defined |= {
                name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)
            }
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            module.defined.add(node.target.id)
        elif isinstance(node, ast.ImportFrom):
            for alias, found in zip(node.names, _imports_of(node, module), strict=True):
                module.bound[alias.asname or alias.name] = found


def _imports_of(node: ast.AST, module: Module) -> list[Import]:
    if isinstance(node, ast.Import):
        return [Import(alias.name, None, node.lineno) for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        source = node.module or ""
        if node.level:
            parents = module.name.split(".")
            parents = parents[: len(parents) - node.level + (1 if module.is_package else 0)]
            source = ".".join([*parents, *([node.module] if node.module else [])])
        return [Import(source, alias.name, node.lineno) for alias in node.names]
    if isinstance(node, ast.Call) and _called(node) == "import_module" and node.args:
        name = node.args[0]
        if isinstance(name, ast.Constant) and isinstance(name.value, str):
            return [Import(name.value, None, node.lineno)]
    return []


def _called(node: ast.Call) -> str:
    function = node.func
    return (
        function.attr if isinstance(function, ast.Attribute) else function.id if isinstance(function, ast.Name) else ""
    )


def cycles(house: House) -> Iterator[Violation]:
    """Import cycles, shortest first; no import is part of two of them."""
    edges = house.edges()
    while groups := _strongly_connected(edges):
        for group in groups:
            inner = {name: {to: line for to, line in edges[name].items() if to in group} for name in group}
            cycle = min((_shortest_cycle(inner, name) for name in sorted(group)), key=len)
            way = ", ".join(f"{here} imports {to} in line {inner[here][to]}" for here, to in pairwise(cycle))
            yield Violation(
                house.shown(house.modules[cycle[0]].path),
                inner[cycle[0]][cycle[1]],
                "cycle",
                f"a cycle of {len(cycle) - 1} modules: {way}",
                "move what both need into a module below both, or pass it as an argument",
            )
            for here, to in pairwise(cycle):
                del edges[here][to]


def _shortest_cycle(edges: dict[str, dict[str, int]], start: str) -> list[str]:
    came_from: dict[str, str] = {}
    queue = deque([start])
    while queue:
        here = queue.popleft()
        for to in sorted(edges[here]):
            if to == start:
                way = [start, here]
                while way[-1] != start:
                    way.append(came_from[way[-1]])
                return way[::-1]
            if to not in came_from:
                came_from[to] = here
                queue.append(to)
    raise AssertionError(f"{start} is on no cycle")


def _strongly_connected(edges: dict[str, dict[str, int]]) -> list[set[str]]:
    """Sets of two or more nodes that all reach each other (Kosaraju)."""
    order: list[str] = []
    seen: set[str] = set()
    for start in edges:
        stack = [(start, iter(edges[start]))] if start not in seen else []
        seen.add(start)
        while stack:
            node, following = stack[-1]
            to = next((each for each in following if each not in seen), None)
            if to is None:
                order.append(node)
                stack.pop()
            else:
                seen.add(to)
                stack.append((to, iter(edges[to])))
    backward: dict[str, set[str]] = defaultdict(set)
    for node, targets in edges.items():
        for to in targets:
            backward[to].add(node)
    groups, placed = [], set[str]()
    for start in reversed(order):
        group: set[str] = set()
        pending = [start]
        while pending:
            node = pending.pop()
            if node not in placed:
                placed.add(node)
                group.add(node)
                pending.extend(backward[node])
        if len(group) > 1:
            groups.append(group)
    return groups


def task_switches(house: House) -> Iterator[Violation]:
    """Names of a task's own types and flags in code that must not ask which task it is."""
    for module in house.modules.values():
        if module.inside.startswith(KNOWS_TASKS):
            continue
        found = {(line, name) for name, line in _identifiers(module.tree) if name in TASK_NAMES}
        for line, name in sorted(found):
            yield Violation(
                house.shown(module.path),
                line,
                "task",
                f"`{name}` asks which task it is",
                f"let the network's Task answer, in {KNOWS_TASKS[0]}",
            )


def _identifiers(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute):
            yield node.attr, node.end_lineno or node.lineno
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.arg, node.value.lineno
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                for name in {alias.name, alias.asname or alias.name}:
                    yield name, alias.lineno


Function = ast.FunctionDef | ast.AsyncFunctionDef


def _functions(module: Module) -> Iterator[Function]:
    for node in ast.walk(module.tree):
        if isinstance(node, Function):
            yield node


def parameters(house: House) -> Iterator[Violation]:
    """Functions of too many parameters, except for the public verbs, the commands and GPU kernels."""
    verbs = _public_verbs(house)
    for module in house.modules.values():
        methods = {id(child) for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef) for child in node.body}
        for function in _functions(module):
            if (module.name, function.name) in verbs or (module.inside.startswith("cli/") and _is_command(function)):
                continue
            if any("jit" in dict(_identifiers(each)) for each in function.decorator_list):
                continue  # a GPU kernel takes pointers and sizes, and no objects
            given = function.args
            own = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
            static = any(isinstance(each, ast.Name) and each.id == "staticmethod" for each in function.decorator_list)
            count = len(own) - (id(function) in methods and not static)
            if count > MOST_PARAMETERS:
                yield Violation(
                    house.shown(module.path),
                    function.lineno,
                    "parameters",
                    f"{function.name} has {count} parameters, more than {MOST_PARAMETERS}",
                    "pass the object that they come from (recipe, target, bundle), or divide the function",
                )


def _public_verbs(house: House) -> set[tuple[str, str]]:
    """Module and name of what the package's `__all__` names."""
    root = house.modules.get(house.root.name)
    if root is None:
        return set()
    names = [
        each.value
        for node in root.tree.body
        if isinstance(node, ast.Assign) and any(isinstance(to, ast.Name) and to.id == "__all__" for to in node.targets)
        for each in ast.walk(node.value)
        if isinstance(each, ast.Constant) and isinstance(each.value, str)
    ]
    return {(house.owner(Import(root.name, name, 0)) or "", name) for name in names}


def _is_command(function: Function) -> bool:
    """Whether typer calls it: it is named `command`, or a decorator registers it."""
    calls = (each.func if isinstance(each, ast.Call) else each for each in function.decorator_list)
    return function.name == "command" or any(
        isinstance(each, ast.Attribute) and each.attr in ("command", "callback") for each in calls
    )


def lengths(house: House) -> Iterator[Violation]:
    """Functions that do not fit a screen, and files that tell more than one story."""
    for module in house.modules.values():
        path = house.shown(module.path)
        if (lines := len(module.text.splitlines())) > MOST_FILE_LINES:
            what = f"the file has {lines} lines, more than {MOST_FILE_LINES}"
            yield Violation(path, 1, "file", what, "divide it where its story divides")
        for function in _functions(module):
            # Without signature and docstring: a public verb has as many lines of both as it has options.
            body = function.body[ast.get_docstring(function, clean=False) is not None :]
            lines = (function.end_lineno or 0) - body[0].lineno + 1 if body else 0
            if lines > MOST_FUNCTION_LINES:
                what = f"{function.name} has {lines} lines of body, more than {MOST_FUNCTION_LINES}"
                yield Violation(
                    path, function.lineno, "function", what, "divide it into functions that each do one thing"
                )


def class_names(house: House) -> Iterator[Violation]:
    """Public classes and type aliases, defined at a module's top level, of one name."""
    places: dict[str, list[tuple[Module, int]]] = defaultdict(list)
    for module in house.modules.values():
        for node in module.tree.body:
            if isinstance(node, ast.ClassDef):
                names = [node.name]
            elif isinstance(node, ast.Assign):
                names = [to.id for to in node.targets if isinstance(to, ast.Name)]
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names = [node.target.id]
            else:
                continue
            for name in names:
                if re.fullmatch(r"[A-Z]\w*[a-z]\w*", name):
                    places[name].append((module, node.lineno))
    for name, found in places.items():
        for module, line in found if len(found) > 1 else ():
            others = ", ".join(f"{house.shown(each.path)}:{at}" for each, at in found if each is not module)
            what = f"`{name}` is also defined in {others}"
            yield Violation(house.shown(module.path), line, "class-name", what, "give each a name of its own meaning")


def english(house: House) -> Iterator[Violation]:
    """Phrases and spellings of the old dialect in prose, and words of it in names that are defined."""
    phrases = [(re.compile(rf"\b(?:{pattern})\b", re.IGNORECASE), instead) for pattern, instead in DIALECT.items()]
    british = re.compile(rf"(?<![-`_.'\"/=\w])(?:{BRITISH})(?![-`_='\":/\w])", re.IGNORECASE)
    texts = [(module.path, _prose(module.text)) for module in house.modules.values()]
    texts += [(path, [Prose([(path.read_text(encoding="utf-8"), 1)])]) for path in sorted(house.root.rglob("*.j2"))]
    for path, proses in texts:
        for prose in proses:
            for pattern, instead in phrases:
                for found in pattern.finditer(prose.text):
                    what = f"“{' '.join(found[0].split())}”"
                    yield Violation(house.shown(path), prose.line(found.start()), "dialect", what, f"write: {instead}")
            for found in british.finditer(prose.text):
                if found[0].lower() in KEYS:
                    continue
                what = f"“{found[0]}” is British"
                yield Violation(
                    house.shown(path), prose.line(found.start()), "spelling", what, "spell it the American way"
                )
    for module in house.modules.values():
        yield from _names(house, module)
        yield from _moods(house, module)


def _names(house: House, module: Module) -> Iterator[Violation]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            instead = DIALECT_NAMES.get(node.name)
            if instead is None and DIALECT_WORDS & set(node.name.lower().split("_")):
                instead = "summary, shows, reports"
            if instead is not None:
                what = f"the name `{node.name}`"
                yield Violation(house.shown(module.path), node.lineno, "dialect", what, f"write: {instead}")


def _moods(house: House, module: Module) -> Iterator[Violation]:
    for function in _functions(module):
        docstring = ast.get_docstring(function) or ""
        first = THIRD_PERSON.match(docstring)
        if first:
            what = f"the docstring begins with “{first[0]}”"
            line = function.body[0].lineno
            yield Violation(house.shown(module.path), line, "mood", what, "begin with the imperative or a noun")


class Prose:
    """Text that is read as one, made of pieces that begin on known lines."""

    def __init__(self, pieces: list[tuple[str, int]]) -> None:
        self.text = "".join(text for text, _ in pieces)
        self._starts, self._lines = [0], [pieces[0][1]]
        at = 0
        for text, line in pieces:
            self._starts.append(at)
            self._lines.append(line)
            for offset, character in enumerate(text):
                if character == "\n":
                    line += 1
                    self._starts.append(at + offset + 1)
                    self._lines.append(line)
            at += len(text)

    def line(self, offset: int) -> int:
        return self._lines[bisect_right(self._starts, offset) - 1]


_OPENING = re.compile(r"(?i)^([rbuf]*)('''|\"\"\"|'|\")")
_FSTRING = {
    getattr(tokenize, name) for name in ("FSTRING_START", "FSTRING_MIDDLE", "FSTRING_END") if hasattr(tokenize, name)
}


def _prose(text: str) -> list[Prose]:
    """Strings and comments of a file, those that follow each other joined."""
    groups: list[list[tuple[str, int]]] = []
    kind = ""  # of the group that is still open
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        line = token.start[0]
        if token.type == tokenize.COMMENT:
            alone = token.line.lstrip().startswith("#")
            if not (kind == "comment" and alone):
                groups.append([])
            groups[-1].append((token.string.lstrip("#") + "\n", line))
            kind = "comment" if alone else ""
        elif token.type == tokenize.STRING or token.type in _FSTRING:
            if kind != "string":
                groups.append([])
            groups[-1].append((_content(token.string) if token.type == tokenize.STRING else token.string, line))
            kind = "string"
        elif token.type not in (tokenize.NL,) and not (
            kind == "comment" and token.type in (tokenize.INDENT, tokenize.DEDENT)
        ):
            kind = ""
    return [Prose(group) for group in groups]


def _content(literal: str) -> str:
    opening = _OPENING.match(literal)
    if opening is None:
        return literal
    content = literal[opening.end() : -len(opening[2])].replace("\\n", "  ")
    return (
        re.sub(r"\{[^{}]*\}", lambda found: re.sub(r"[^\n]", " ", found[0]), content)
        if "f" in opening[1].lower()
        else content
    )


RULES: tuple[Callable[[House], Iterator[Violation]], ...] = (
    cycles,
    task_switches,
    parameters,
    lengths,
    class_names,
    english,
)


def check(root: Path) -> list[Violation]:
    """All violations in the package whose folder this is, by path and line."""
    house = House(root)
    return sorted({violation for rule in RULES for violation in rule(house)})


def main(arguments: list[str]) -> int:
    root = Path(arguments[0]) if arguments else Path(__file__).parents[1] / "litdeploy"
    found = check(root.resolve())
    for violation in found:
        print(violation)
    counts = Counter(violation.rule for violation in found)
    by_rule = ", ".join(f"{rule} {count}" for rule, count in counts.most_common())
    print(f"{root.name}: {len(found)} violations ({by_rule})" if found else f"{root.name}: the house is in order")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
