"""What the site takes from elsewhere in the repository, written to docs/generated before Sphinx reads pages.

- generated/api: a page for each public module, every public name on it once, at its shortest name.
- generated/results and benchmarks.md, contributing.md, changelog.md beside it: the repository's own pages.
- generated/notebooks: the notebooks, which the build executes.

Links between pages of the repository lead to the pages of the site, those to other files to the repository.
"""

import importlib
import inspect
import pathlib
import pkgutil
import re
import shutil
import types

DOCS = pathlib.Path(__file__).parent.parent
ROOT = DOCS.parent
OUT = DOCS / "generated"
CODE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(\]\()(?!https?://|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")

RUNS = """
```{toctree}
:hidden:
:glob:

*/index
```
"""


def public_modules() -> list[types.ModuleType]:
    """Stochsolvers and the modules in it whose names do not begin with an underscore."""
    top = importlib.import_module("stochsolvers")
    names = [info.name for info in pkgutil.iter_modules(top.__path__)]
    return [top] + [
        importlib.import_module(f"stochsolvers.{name}")
        for name in names
        if not name.startswith("_")
    ]


def public_names(module: types.ModuleType) -> list[str]:
    """What a user can call `module.name`, in the order of its file; no modules, no imports of others."""
    defined = {} if not hasattr(module, "__path__") else None
    names = []
    for name, value in vars(module).items():
        if name.startswith("_") or isinstance(value, types.ModuleType):
            continue
        home = getattr(value, "__module__", "") or ""
        if defined is not None and home != module.__name__ and not is_alias(value):
            continue
        if home.startswith("stochsolvers") or is_alias(value):
            names.append(name)
    return names


def is_alias(value: object) -> bool:
    """A name for a type, as `Schedule`."""
    return isinstance(value, types.UnionType) or "typing" in type(value).__module__


def reference() -> dict[str, list[tuple[str, object]]]:
    """Each public object under its shortest public name, by module."""
    modules = public_modules()
    shortest: dict[int, str] = {}
    pages: dict[str, list[tuple[str, object]]] = {}
    for module in modules:
        own = pages.setdefault(module.__name__, [])
        for name in public_names(module):
            value = getattr(module, name)
            full = f"{module.__name__}.{name}"
            own.append((shortest.setdefault(id(value), full), value))
    return pages


def entry(name: str, value: object) -> str:
    """The directive of one object."""
    if inspect.isclass(value):
        return f".. autoclass:: {name}\n   :members:\n   :show-inheritance:\n"
    kind = "autofunction" if callable(value) and not is_alias(value) else "autodata"
    return f".. {kind}:: {name}\n"


def reference_page(module: str, names: list[tuple[str, object]]) -> str:
    """A page of the reference, in reStructuredText."""
    title = f"``{module}``"
    parts = [title, "=" * len(title), "", f".. automodule:: {module}", "   :no-members:", ""]
    elsewhere = [name for name, _ in names if name.rpartition(".")[0] != module]
    if elsewhere:
        links = ", ".join(f":py:obj:`{name}`" for name in elsewhere)
        parts += [f"Also here: {links}.", ""]
    for name, value in names:
        if name not in elsewhere:
            parts += [entry(name, value)]
    return "\n".join(parts)


def write_reference() -> None:
    """generated/api."""
    pages = reference()
    for module, names in pages.items():
        write(OUT / "api" / f"{module}.rst", reference_page(module, names))
    listed = "\n".join(f"{module} <{module}>" for module in pages)
    head = "# Reference\n\nEvery public name once, with its formula, shapes, units and errors.\n\n"
    write(OUT / "api" / "index.md", f"{head}```{{toctree}}\n:maxdepth: 1\n\n{listed}\n```\n")


def site_pages() -> dict[str, str]:
    """Files and folders of the repository that are pages of the site, and where they are in docs/."""
    pages = {f"docs/{path.name}": path.name for path in DOCS.glob("*.md")}
    pages |= {
        f"notebooks/{path.name}": f"generated/notebooks/{path.name}"
        for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
    }
    for name, target in (
        ("benchmarks/README.md", "generated/benchmarks.md"),
        ("CONTRIBUTING.md", "generated/contributing.md"),
        ("CHANGELOG.md", "generated/changelog.md"),
    ):
        if (ROOT / name).exists():
            pages[name] = target
    pages["experiments/results/README.md"] = "generated/results/index.md"
    for path in sorted((ROOT / "experiments/results").glob("*/README.md")):
        name = path.parent.name
        pages[f"experiments/results/{name}/README.md"] = f"generated/results/{name}/index.md"
    folders = {
        name.removesuffix("/README.md"): to for name, to in pages.items() if "/README" in name
    }
    return pages | folders


def relink(text: str, source: str, target: str, url: str) -> str:
    """Links of the repository's file `source` as those of the site's file `target`."""
    pages = site_pages()

    def replaced(match: re.Match[str]) -> str:
        path = (ROOT / source).parent / match[2]
        name = pathlib.PurePath(path.resolve()).relative_to(ROOT.resolve()).as_posix()
        if name in pages:
            up = "../" * target.count("/")
            return f"{match[1]}{up}{pages[name]}{match[3] or ''})"
        if path.suffix == ".png":
            return match[0]
        kind = "tree" if path.is_dir() else "blob"
        return f"{match[1]}{url}/{kind}/main/{name})"

    parts = CODE.split(text)
    return "".join(LINK.sub(replaced, part) if i % 2 == 0 else part for i, part in enumerate(parts))


def write_pages(url: str) -> None:
    """The copies of the repository's pages, with the pictures and notebooks beside them."""
    for source, target in site_pages().items():
        if not target.startswith("generated/") or not (ROOT / source).is_file():
            continue
        if source.endswith(".md"):
            text = relink((ROOT / source).read_text("utf-8"), source, target, url)
            for picture in sorted((ROOT / source).parent.glob("*.png")):
                copy(picture, (OUT.parent / target).parent / picture.name)
                if f"]({picture.name})" not in text:  # a page of results names its pictures
                    text += f"\n![{picture.stem}]({picture.name})\n"
            write(OUT.parent / target, text + RUNS * (target == "generated/results/index.md"))
        else:
            copy(ROOT / source, OUT.parent / target)


def write(path: pathlib.Path, text: str) -> None:
    """Leave a file alone that has this text, so that Sphinx does not read it again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text("utf-8") != text:
        path.write_text(text, "utf-8")


def copy(source: pathlib.Path, target: pathlib.Path) -> None:
    """The same of a file of any kind."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists() or target.read_bytes() != source.read_bytes():
        shutil.copyfile(source, target)


def generate(app, config):
    """Sphinx's event before it looks for pages."""
    write_reference()
    write_pages(config.repository_url)


def read(app, docname, content):
    """The links of the site's own pages to files of the repository."""
    path = pathlib.Path(app.env.doc2path(docname))
    if path.parent == DOCS and path.suffix == ".md":
        name = f"docs/{path.name}"
        content[0] = relink(content[0], name, path.name, app.config.repository_url)


def setup(app):
    """Sphinx's entry point."""
    app.add_config_value("repository_url", "", "env")
    app.connect("config-inited", generate)
    app.connect("source-read", read)
    return {"parallel_read_safe": True}
