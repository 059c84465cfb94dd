"""The page of `skipdit app` after a comparison, as a picture: visuals/app.png.

    python scripts/screenshot_app.py
    python scripts/screenshot_app.py --config configs/text-to-image/demo.yaml --out page.png

Needs gradio, Playwright and a Chromium: pip install -e ".[app]" playwright, and python -m playwright install chromium
or apt-get install chromium.
"""

import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from skipdit.app.jobs import Studio
from skipdit.app.page import build, launch
from skipdit.cli import Parser, friendly_errors
from skipdit.utils.errors import UserError


@friendly_errors()
def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--config", default="configs/class-to-video/demo.yaml", metavar="FILE", help="[%(default)s]")
    parser.add_argument("--width", type=int, default=1280, help="of the window, in pixels [%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("visuals/app.png"), metavar="FILE", help="[%(default)s]")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the config's")
    args = parser.parse_intermixed_args()
    page = build(Studio(), [args.config], None, args.overrides)
    _, address, _ = launch(page, "127.0.0.1", None, prevent_thread_lock=True, quiet=True)
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        program = own if Path(own).exists() else shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": args.width, "height": 800}, color_scheme="light")
        tab.goto(address)
        tab.get_by_role("button", name="Compare").click()
        shown = tab.wait_for_selector("#results .card, #results [role=alert]", timeout=600_000)
        if shown.get_attribute("role") == "alert":
            raise UserError(shown.inner_text())
        tab.wait_for_timeout(1000)  # the bar of progress fades
        tab.screenshot(path=args.out, full_page=True)
        browser.close()
    page.close()
    Image.open(args.out).convert("RGB").quantize(256).save(args.out, optimize=True)  # less than half the bytes


if __name__ == "__main__":
    main()
