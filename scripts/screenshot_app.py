"""Screenshots of the page of `python -m skipdit app`: visuals/app-class-to-image.png and visuals/app-text-to-image.png.

    python scripts/screenshot_app.py

Needs gradio, playwright and a Chromium: python -m playwright install chromium, or apt-get install chromium.
"""

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

from skipdit.app.jobs import Studio
from skipdit.app.page import build, launch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["class-to-image", "text-to-image"], metavar="NAME")
    parser.add_argument("--width", type=int, default=1280, help="of the window, in pixels [%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("visuals"), metavar="DIR", help="[%(default)s]")
    args = parser.parse_args()
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        program = own if Path(own).exists() else shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for task in args.tasks:
            page = build(Studio(), [f"configs/{task}/demo.yaml"])
            _, address, _ = launch(page, "127.0.0.1", None, prevent_thread_lock=True, quiet=True)
            tab = browser.new_page(viewport={"width": args.width, "height": 800}, color_scheme="light")
            tab.goto(address)
            tab.wait_for_function("document.querySelector('#steps input')?.value")
            tab.get_by_role("button", name="Compare").click()
            tab.wait_for_selector("#results .row", timeout=600_000)
            tab.wait_for_timeout(1000)  # the bar of progress fades
            tab.screenshot(path=args.out / f"app-{task}.png", full_page=True)
            tab.close()
            page.close()
        browser.close()


if __name__ == "__main__":
    main()
