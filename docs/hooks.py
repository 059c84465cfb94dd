"""Hooks of MkDocs that bring files outside docs/ into the site: READMEs, CONTRIBUTING.md and the images in visuals/.

Links in Markdown are those that work in the repository. Here each becomes the link that works in the site. A link to a
file that is not in the site, such as a source file, becomes its text.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

OUTSIDE = (
    "README.md",
    "CONTRIBUTING.md",
    "*-to-*/README.md",
    "integrations/*/README.md",
    "visuals/*.png",
    "visuals/*.gif",
)
LINK = re.compile(r"\[([^\[\]]*)\]\(([^()\s#:]+)(#[^()\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    root = Path(config.config_file_path).parent
    for path in sorted(path for pattern in OUTSIDE for path in root.glob(pattern)):
        files.append(File.generated(config, path.relative_to(root).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    root, source = Path(config.config_file_path).parent, page.file.src_uri
    folder = posixpath.dirname(source if page.file.generated_by else f"docs/{source}")

    def site_link(link: re.Match) -> str:
        text, target, anchor = link.groups(default="")
        path = posixpath.normpath(posixpath.join(folder, target))
        name = path.removeprefix("docs/")
        if files.get_file_from_path(name):
            return f"[{text}]({posixpath.relpath(name, posixpath.dirname(source) or '.')}{anchor})"
        if path.startswith("docs/") or not (root / path).exists():
            return link[0]  # MkDocs warns of it
        return f"`{text}`" if target.endswith(text) else text

    return LINK.sub(site_link, markdown)
