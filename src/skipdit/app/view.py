"""What the page shows of a comparison, as HTML."""

import base64
from html import escape

from skipdit.app.jobs import Comparison, Result
from skipdit.caching.policy import NAMES
from skipdit.sampling.report import steps_in_words

TYPES = {"png": ("image/png", "image/png"), "mp4": ("video/mp4", "image/gif")}  # of the file, and of what is shown
STYLE = """
.gradio-container {max-width: 1400px !important; margin: 0 auto}
#results .cards {display: grid; grid-template-columns: repeat(auto-fill, minmax(196px, 1fr)); gap: 12px}
#results .card {border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 12px; min-width: 0;
  max-width: 420px; background: var(--background-fill-primary)}
#results h3 {margin: 0 0 8px; font-size: 1rem; font-weight: 600; overflow-wrap: anywhere}
#results img {width: 100%; image-rendering: pixelated; border-radius: 4px; display: block}
#results p {margin: 8px 0; font-size: .82rem}
#results .what {color: color-mix(in srgb, var(--body-text-color) 75%, transparent); font-size: .8rem; margin: 6px 0}
#results pre {white-space: pre-wrap; overflow-wrap: anywhere; font-size: .72rem; padding: 8px; border-radius: 4px;
  background: var(--background-fill-secondary); user-select: all; margin: 6px 0}
#results a {padding: 0; margin-right: 8px; text-decoration: underline}
#results summary {cursor: pointer; font-size: .85rem; margin-top: 6px}
#results .strip {display: flex; height: 14px; border-radius: 3px; overflow: hidden}
#results .strip i {flex: 1; box-shadow: inset -1px 0 var(--background-fill-primary)}
#results .full {background: #1d4e89}
#results .cached {background: #9cc5e8}
#results .forecast {background: #f2a541}
#results .legend i {display: inline-block; width: 12px; height: 12px; border-radius: 2px; margin: 0 4px 0 12px}
#results .legend i:first-child {margin-left: 0}
#results .error {border-left: 4px solid #c62828; padding: 12px 16px; background: var(--background-fill-secondary)}
"""


def comparison_html(comparison: Comparison) -> str:
    """Return cards, one per result, below the notes and the colours of the strips."""
    notes = "".join(f"<p>{escape(note)}</p>" for note in comparison.notes)
    colours = "".join(f'<i class="{kind}"></i>{kind} steps' for kind in NAMES.values())
    cards = "".join(_card(result, comparison.factor) for result in comparison.results)
    return f'{notes}<p class="what legend">{colours}</p><div class="cards">{cards}</div>'


def error_html(message: str) -> str:
    """Return what is wrong with a request, in words."""
    return f'<p class="error" role="alert">{escape(message[:1].upper() + message[1:])}</p>'


def strip_html(kinds: list[str]) -> str:
    """Return the steps of a run from noise to image, a coloured cell each."""
    counts = {kind: kinds.count(kind) for kind in NAMES.values()}
    cells = "".join(f'<i class="{kind}"></i>' for kind in kinds)
    told = steps_in_words(counts)
    return f'<div class="strip" role="img" aria-label="{told}" title="{told}">{cells}</div><p class="what">{told}</p>'


def _card(result: Result, factor: int) -> str:
    row, (kind, shown) = result.row, TYPES[result.suffix]
    title, name = escape(row["name"]), result.command.rpartition("/")[2]
    facts = f"{row['seconds_per_sample']:.2f} s"
    image, difference = f'<img alt="{title}" src="{_uri(result.shown, shown)}">', ""
    if row["name"] != "uncached":
        facts += f", speedup {row['speedup']:.2f}<br>speedup in FLOPs {row['flops_speedup']:.2f}<br>"
        facts += "the same pixels" if row["identical"] else f"PSNR {row['psnr']:.1f} dB, SSIM {row['ssim']:.3f}"
        difference = f'<p class="what">Difference, times {factor}</p>'
        difference += f'<img alt="difference of {title}" src="{_uri(result.difference, shown)}">'
    files = {result.suffix.upper(): (f"{name}.{result.suffix}", _uri(result.file, kind))}
    files["command"] = f"{name}.sh", _uri(f"{result.command}\n".encode(), "text/plain")
    links = (
        f'<a download="{file}" href="{uri}" aria-label="Download {what}">↓ {what}</a>'
        for what, (file, uri) in files.items()
    )
    parts = [f"<h3>{title}</h3>", image, f"<p>{facts}</p>", strip_html(row["kinds"]), difference]
    parts += [f"<p>{''.join(links)}</p>", "<details><summary>Command that makes it</summary>"]
    return f'<div class="card">{"".join(parts)}<pre>{escape(result.command)}</pre></details></div>'


def _uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
