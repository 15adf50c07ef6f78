"""Pages of the site that are not in docs/: README and its like, as they are, and the API reference, a page per room."""

import pathlib
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "", "CHANGELOG.md": "", "SECURITY.md": ""}
PUBLIC = """# marjax

::: marjax
    options: {members: false, show_root_heading: false}

::: marjax.train
::: marjax.sample
::: marjax.load
::: marjax.generation.loaded.Loaded
::: marjax.evaluate
::: marjax.register
::: marjax.config
::: marjax.loggers
"""
LINK = re.compile(r"\[([^]]*)\]\((?![a-z]+:|#)([^)#]+)(#[^)]*)?\)")


def rooms() -> dict[str, list[str]]:
    """{page: modules}: the files at the top, and every folder with all below it."""
    found: dict[str, list[str]] = {"top": []}
    for path in sorted((ROOT / "marjax").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if not parts[-1].startswith("__"):
            found.setdefault(parts[1] if len(parts) > 2 else "top", []).append(".".join(parts))
    return found


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    for entry in config.nav:
        if "API" in entry:
            entry["API"] = [{"marjax": "api/index.md"}, {"Rooms": [f"api/{name}.md" for name in rooms()]}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = {new or old: (ROOT / old).read_text("utf-8") for old, new in PAGES.items()}
    pages["api/index.md"] = PUBLIC
    for name, modules in rooms().items():
        title = "Top-level files" if name == "top" else f"marjax/{name}"
        pages[f"api/{name}.md"] = f"# {title}\n\n" + "\n".join(f"::: {module}" for module in modules)
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page, config: MkDocsConfig, files: Files) -> str:
    """Links relative to the repository become links of the site; those to files that are not on it, plain text."""

    def link(match: re.Match[str]) -> str:
        path = match[2].removeprefix("../").removeprefix("docs/")
        target = PAGES.get(path) or path
        if (ROOT / path).exists() and not files.get_file_from_path(target):
            return match[1]
        return f"[{match[1]}]({target}{match[3] or ''})"

    return LINK.sub(link, markdown)
