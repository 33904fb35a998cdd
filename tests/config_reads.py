"""Which fields of the config the code behind a stage reads: found in its sources, function by function, by their types."""

import ast
import builtins
import dataclasses
import functools
import pathlib
import typing

from r1jax import schema

ROOT = pathlib.Path(__file__).resolve().parents[1]
PARTS = {kind.__name__: kind for kind in vars(schema).values() if dataclasses.is_dataclass(kind)}
Place = tuple[str, str]  # (module, name of a function, of a class, or CLASS.METHOD)
Read = tuple[str, str]  # (class of the config, field)


@functools.cache
def field_types(name: str) -> dict[str, str]:
    """Returns {field: class of the config, or ''} of a class of the config."""
    hints = typing.get_type_hints(PARTS[name])
    kinds = {field.name: getattr(hints[field.name], "__name__", "") for field in dataclasses.fields(PARTS[name])}
    return {field: kind if kind in PARTS else "" for field, kind in kinds.items()}


class Module:
    """One source: its definitions, and what its names stand for."""

    def __init__(self, name: str, path: pathlib.Path):
        self.name = name
        self.tree = ast.parse(path.read_text(encoding="utf-8"))
        self.texts = {node.value for node in ast.walk(self.tree) if isinstance(node, ast.Constant)}
        self.definitions: dict[str, ast.AST] = {}
        self.imports: dict[str, str] = {}  # name here -> dotted name
        self.values: dict[str, ast.AST] = {}  # names that are assigned at the top
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                self.imports |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        for node in self.tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                self.definitions[node.name] = node
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                self.values |= {target.id: node for target in targets if isinstance(target, ast.Name)}
            elif isinstance(node, ast.If):  # what a process of its own runs
                self.definitions["__main__"] = node
            if isinstance(node, ast.ClassDef):
                methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
                self.definitions |= {f"{node.name}.{method.name}": method for method in methods}


@functools.cache
def modules() -> dict[str, Module]:
    """Returns every module of the project by its dotted name."""
    paths = [*(ROOT / "r1jax").rglob("*.py")]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths}
    return {name: Module(name, path) for path, name in names.items()}


def resolve(module: Module, node: ast.AST) -> Place | None:
    """Returns the definition that a name or MODULE.NAME stands for, None for anything else."""
    if isinstance(node, ast.Name):
        if node.id in module.definitions or node.id in module.values:
            return module.name, node.id
        owner, _, name = module.imports.get(node.id, "").rpartition(".")
        if owner == "r1jax.schema" and name in PARTS:
            return owner, name
        known = modules().get(owner)
        return (owner, name) if known and (name in known.definitions or name in known.values) else None
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        known = modules().get(module.imports.get(node.value.id, ""))
        if known and (node.attr in known.definitions or node.attr in known.values):
            return known.name, node.attr
        if known and known.name == "r1jax.schema" and node.attr in PARTS:
            return known.name, node.attr
    return None


def of_annotation(module: Module, node: ast.AST | None) -> "Place | tuple | None":
    """Returns the class that an annotation names: a Place, or a tuple of such for a tuple's parts."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        node = ast.parse(node.value, mode="eval").body
    if isinstance(node, ast.BinOp):  # X | None
        return of_annotation(module, node.left) or of_annotation(module, node.right)
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if node.value.id == "tuple" and not any(isinstance(one, ast.Constant) for one in inner):
            return ("tuple", *(of_annotation(module, one) for one in inner))
        return None
    return resolve(module, node) if isinstance(node, ast.Name | ast.Attribute) else None


_attributes: dict[Place, dict[str, typing.Any]] = {}


def attributes(place: Place) -> dict[str, typing.Any]:
    """Returns {attribute: class} of the objects of a class: its annotated fields and what `__init__` puts there."""
    if place in _attributes:
        return _attributes[place]
    module, name = modules()[place[0]], place[1]
    node, found = module.definitions.get(name), {}
    _attributes[place] = found
    if not isinstance(node, ast.ClassDef):
        return found
    for base in node.bases:
        if (parent := resolve(module, base)) and parent != place:
            found |= attributes(parent)
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            found[item.target.id] = of_annotation(module, item.annotation)
    if (start := module.definitions.get(f"{name}.__init__")) is not None:
        body = Body(module, start, name)
        body.own = found  # what is set above is known below
        body.walk()
    return found


class Body:
    """One function: the fields of the config that it reads, and the definitions that it uses."""

    def __init__(self, module: Module, node: ast.AST, owner: str = "", outer: dict | None = None):
        self.module, self.node, self.owner = module, node, owner
        self.types: dict[str, typing.Any] = dict(outer or {})
        self.own: dict[str, typing.Any] = {}  # attributes of self that are set here
        self.reads: set[Read] = set()
        self.uses: set[Place] = set()

    def walk(self) -> None:
        arguments = getattr(self.node, "args", None)
        if isinstance(arguments, ast.arguments):
            for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
                kind = of_annotation(self.module, one.annotation)
                if one.arg == "self" and self.owner:
                    kind = self.module.name, self.owner
                if kind or one.arg in self.types:
                    self.types[one.arg] = kind or self.types[one.arg]
        for _ in range(2):  # names that are used above where they are set, in inner functions
            for statement in getattr(self.node, "body", [self.node]):
                self.visit(statement)

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            inner = Body(self.module, node, "", self.types)
            if isinstance(node, ast.Lambda):
                inner.visit(node.body)
            else:
                inner.walk()
            self.reads, self.uses = self.reads | inner.reads, self.uses | inner.uses
            return
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self.assign(target, self.kind(node.value), node.value)
        elif isinstance(node, ast.NamedExpr):
            self.assign(node.target, self.kind(node.value), node.value)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            self.assign(node.target, of_annotation(self.module, node.annotation), node.value)
        elif isinstance(node, ast.For | ast.comprehension):
            self.assign(node.target, self.kind(node.iter), node.iter)
        elif isinstance(node, ast.withitem) and node.optional_vars is not None:
            self.assign(node.optional_vars, self.kind(node.context_expr), node.context_expr)
        if isinstance(node, ast.Attribute):
            self.kind(node)
        if isinstance(node, ast.Name | ast.Attribute) and (place := resolve(self.module, node)):
            self.uses.add(place)
        elif isinstance(node, ast.Constant) and node.value in modules():
            self.uses.add((node.value, "__main__"))
        if isinstance(node, ast.Call):
            self.call(node)
        children = list(ast.iter_child_nodes(node))
        loops = [child for child in children if isinstance(child, ast.comprehension)]
        for child in (*loops, *(child for child in children if child not in loops)):
            self.visit(child)

    def assign(self, target: ast.AST, kind: typing.Any, value: ast.AST | None) -> None:
        if isinstance(target, ast.Tuple):
            parts = value.elts if isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts) else None
            for index, one in enumerate(target.elts):
                if parts:
                    self.assign(one, self.kind(parts[index]), parts[index])
                elif isinstance(kind, tuple) and kind[:1] == ("tuple",) and index + 1 < len(kind):
                    self.assign(one, kind[index + 1], None)
        elif kind and isinstance(target, ast.Name):
            self.types[target.id] = kind
        elif kind and isinstance(target, ast.Attribute) and getattr(target.value, "id", "") == "self":
            self.own[target.attr] = kind

    def call(self, node: ast.Call) -> None:
        """Notes the fields that `getattr` reads by name, each text of the module that names one, and those of `parts_of`."""
        if getattr(node.func, "id", "") == "parts_of" and (taken := resolve(self.module, node.args[0])):
            for name in attributes(taken):  # read of the whole config under its own name
                self.attribute(("r1jax.schema", "Config"), name)
        if getattr(node.func, "id", "") in ("getattr", "vars") and node.args:
            kind = self.kind(node.args[0])
            if kind and kind[1] in PARTS and kind[0] == "r1jax.schema":
                texts = self.module.texts if node.func.id == "getattr" else set(field_types(kind[1]))
                self.reads |= {(kind[1], name) for name in field_types(kind[1]) if name in texts}

    def kind(self, node: ast.AST) -> typing.Any:
        """Returns the class of an expression's value, None where that is not known; notes the fields that are read."""
        if isinstance(node, ast.Name):
            if node.id in self.types:
                return self.types[node.id]
            place = resolve(self.module, node)
            return place if place and place[1] not in vars(builtins) else None
        if isinstance(node, ast.Attribute):
            owner = self.kind(node.value)
            return self.attribute(owner, node.attr) if owner and owner[0] != "tuple" else resolve(self.module, node)
        if isinstance(node, ast.Call):
            return self.returned(node)
        if isinstance(node, ast.IfExp | ast.BoolOp):
            options = [node.body, node.orelse] if isinstance(node, ast.IfExp) else node.values
            return next(filter(None, map(self.kind, options)), None)
        if isinstance(node, ast.Tuple):
            return ("tuple", *map(self.kind, node.elts))
        return None

    def attribute(self, owner: Place, name: str) -> typing.Any:
        if owner[0] == "r1jax.schema" and owner[1] in PARTS:
            if name in field_types(owner[1]):
                self.reads.add((owner[1], name))
                inner = field_types(owner[1])[name]
                return ("r1jax.schema", inner) if inner else None
            return self.property(owner[1], name)
        if owner[1] in modules()[owner[0]].definitions:
            method = modules()[owner[0]].definitions.get(f"{owner[1]}.{name}")
            if method is not None:
                self.uses.add((owner[0], f"{owner[1]}.{name}"))
                return of_annotation(modules()[owner[0]], method.returns) if method.decorator_list else None
            return attributes(owner).get(name)
        return None

    def property(self, owner: str, name: str) -> typing.Any:
        """Returns the class of a property or method of a part of the config; what it reads is read here."""
        for kind in PARTS[owner].__mro__:
            module = modules().get(kind.__module__)
            method = module and module.definitions.get(f"{kind.__name__}.{name}")
            if method:
                body = Body(module, method, "", {"self": ("r1jax.schema", owner)})
                body.walk()
                self.reads |= {read for read in body.reads if not (name == "network" and read[0] == "Config")}
                return of_annotation(module, method.returns)
        return None

    def returned(self, node: ast.Call) -> typing.Any:
        place = resolve(self.module, node.func)
        if getattr(node.func, "id", getattr(node.func, "attr", "")) == "replace" and node.args:
            return self.kind(node.args[0])
        if getattr(node.func, "id", "") == "parts_of":
            return resolve(self.module, node.args[0])
        if place and place[0] == "r1jax.schema":
            return place
        if place:
            target = modules()[place[0]].definitions.get(place[1])
            if isinstance(target, ast.ClassDef):
                return place
            return of_annotation(modules()[place[0]], getattr(target, "returns", None))
        if isinstance(node.func, ast.Attribute):
            owner = self.kind(node.func.value)
            if owner and owner[0] in modules() and owner[0] != "r1jax.schema":
                method = modules()[owner[0]].definitions.get(f"{owner[1]}.{node.func.attr}")
                return of_annotation(modules()[owner[0]], getattr(method, "returns", None))
        return None


@functools.cache
def of_definition(place: Place) -> tuple[frozenset[Read], frozenset[Place]]:
    """Returns (fields read, definitions used) by one definition; of a class those of its methods and bases."""
    module, name = modules()[place[0]], place[1]
    node = module.definitions.get(name) or module.values.get(name)
    if node is None:
        return frozenset(), frozenset()
    if not isinstance(node, ast.ClassDef):
        body = Body(module, node, name.rpartition(".")[0])
        body.walk()
        return frozenset(body.reads), frozenset(body.uses)
    methods = {(place[0], key) for key in module.definitions if key.startswith(f"{name}.")}
    bases = {base for base in (resolve(module, one) for one in node.bases) if base}
    return frozenset(), frozenset(methods | bases)


def of_stage(function: str) -> set[Read]:
    """Returns the (class, field) of the config that are read by what MODULE:NAME below r1jax uses, directly or not."""
    module, _, name = function.partition(":")
    waiting, seen, found = [(f"r1jax.{module}", name)], set(), set()
    while waiting:
        place = waiting.pop()
        if place in seen or place[0].startswith("r1jax.schema") or place[0] not in modules():
            continue
        seen.add(place)
        reads, uses = of_definition(place)
        found |= {(kind, name) for owner, name in reads for kind in PARTS if issubclass(PARTS[kind], PARTS[owner])}
        waiting += uses
    return found


def owner_of(key: str) -> Read:
    """Returns the (class, field) at a dotted key of the config."""
    kind, *names = "Config", *key.split(".")
    for name in names[:-1]:
        kind = field_types(kind)[name]
    return kind, names[-1]
