"""The dashboard in headless Chromium: a re-split is seen, nothing comes from elsewhere, and it only reads."""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, async_playwright

from models.store import Store
from resplit import control
from resplit.gateway import dashboard_routes
from schemas.deployment import Stage
from tests.integration.cluster_fixtures import CHAT, N0, N1, N2, PROMPT, Oracle
from tests.integration.gateway_fixtures import Front, busy_front

pytestmark = [
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.skipif(
        (shutil.which("chromium") or shutil.which("google-chrome")) is None,
        reason="no Chromium is installed (Debian: apt-get install chromium)",
    ),
]
PAGE_BYTES_MAX = 300_000
SCREENSHOTS = Path(os.environ.get("SCREENSHOTS", "build/screenshots"))


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def front(tmp_path_factory: pytest.TempPathFactory, zoo_store: Store, oracle: Oracle) -> AsyncIterator[Front]:
    async with busy_front(tmp_path_factory.mktemp("dashboard") / "cluster", zoo_store, oracle) as found:
        yield found


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def browser() -> AsyncIterator[Browser]:
    program = shutil.which("chromium") or shutil.which("google-chrome")
    async with async_playwright() as playwright:
        # Its sandbox needs what containers do not give; the page is our own.
        found = await playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield found
        await found.close()


@pytest_asyncio.fixture(loop_scope="session")
async def page(front: Front, browser: Browser) -> AsyncIterator[Page]:
    """The dashboard, drawn; whatever it complains of, or asks of anybody else, fails the test."""
    context = await browser.new_context(viewport={"width": 1280, "height": 1400})
    found = await context.new_page()
    complaints: list[str] = []
    found.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    found.on("pageerror", lambda error: complaints.append(str(error)))
    found.on("request", lambda r: complaints.append(r.url) if not r.url.startswith((front.url, "data:")) else None)
    await found.goto(front.url)
    await found.wait_for_selector(f"#deployment-{CHAT}")
    yield found
    await context.close()
    assert complaints == []


async def test_it_shows_what_the_cluster_is(front: Front, page: Page) -> None:
    assert page.url.endswith("/dashboard/")
    assert "orchestrator leads" in await page.inner_text("#led")
    nodes = await page.inner_text("#nodes")
    assert all(node in nodes for node in (N0, N1, N2))
    labels = await page.locator(f"#deployment-{CHAT} svg.now").get_attribute("aria-label")
    assert labels == "n0: blocks 0 to 1, n1: blocks 2 to 3, n2: blocks 4 to 5"
    assert await page.locator(f"#deployment-{CHAT} svg.now rect").count() == 6
    colours = await page.eval_on_selector_all(
        f"#deployment-{CHAT} svg.now rect", "all => all.map(r => r.getAttribute('fill'))"
    )
    assert len(set(colours)) == 3
    for number in range(6):
        await front.openai.completions.create(model=CHAT, prompt=f"{PROMPT} {number}", max_tokens=5)
    await page.wait_for_selector("#tpot path.dots", state="attached")
    await page.wait_for_selector("#load path", state="attached")
    await page.wait_for_selector("#links td:has-text('ms')")
    await _keep(page, "dashboard.png")


async def test_a_resplit_is_seen_and_why(front: Front, page: Page) -> None:
    before = int((await page.inner_text(f"#deployment-{CHAT} h2")).split("epoch ")[1].split()[0])
    moved = (Stage(node=N2, first=0, last=3), Stage(node=N0, first=4, last=5))
    await control.place_and_wait(front.serving.cluster.operator, CHAT, moved, 30.0)
    now = page.locator(f"#deployment-{CHAT} svg.now[aria-label='n2: blocks 0 to 3, n0: blocks 4 to 5']")
    await now.wait_for()
    past = page.locator(f"#deployment-{CHAT} svg.past").first
    assert await past.get_attribute("aria-label") == "n0: blocks 0 to 1, n1: blocks 2 to 3, n2: blocks 4 to 5"
    card = await page.inner_text(f"#deployment-{CHAT}")
    assert f"epoch {before + 1}" in card
    assert await page.inner_text(f"#deployment-{CHAT} .reason")
    await page.wait_for_selector("#events li:has-text('plan_committed')")
    await page.fill("#filter", "plan_applied")
    await page.wait_for_function(
        "() => [...document.querySelectorAll('#events li b')].every(b => b.textContent === 'plan_applied')"
    )
    await _keep(page, "resplit.png")


async def test_words_of_strangers_are_words(front: Front, page: Page) -> None:
    hostile = {"at": 1, "source": "<img src=x onerror=alert(1)>", "kind": "decision", "message": "<b>m</b>"}
    hostile |= {"fields": {"a": "<script>1</script>"}, "standing": "forged"}
    await page.evaluate("event => { seen.events.push(event); events(); }", hostile)
    row = page.locator("#events li", has_text="onerror").first
    assert "<b>m</b>" in await row.inner_text()
    assert "[forged]" in await row.inner_text()
    assert await page.locator("#events img, #events script").count() == 0


async def test_it_is_light_and_drawn_at_once(front: Front, browser: Browser) -> None:
    context = await browser.new_context()
    page = await context.new_page()
    sizes: list[int] = []
    for name in ("", *dashboard_routes.PAGE):
        found = await front.http.get(f"/dashboard/{name}")
        assert found.status_code == 200
        assert "default-src 'none'" in found.headers["content-security-policy"]
        sizes.append(len(found.content))
    assert sum(sizes[1:]) < PAGE_BYTES_MAX
    await page.goto(f"{front.url}/dashboard/")
    await page.wait_for_selector(f"#deployment-{CHAT}")
    await context.close()


async def test_a_silent_orchestrator_is_said(front: Front, page: Page) -> None:
    cluster = front.serving.cluster
    await cluster.pause("orchestrator")
    try:
        await page.wait_for_selector("#heard.silent", timeout=20_000)
        assert "orchestrator" in await page.inner_text("#heard")
        assert await page.locator(f"#deployment-{CHAT} svg.now").count() == 1, "what was seen last stays"
    finally:
        await cluster.resume("orchestrator")
    await page.wait_for_selector("#heard:not(.silent)", timeout=20_000)


async def test_nothing_can_be_changed_through_it(front: Front) -> None:
    for path in ("/dashboard/", "/dashboard/watch", "/dashboard/why", "/metrics", "/"):
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            found = await front.http.request(method, path, json={})
            assert found.status_code == 405
    why = await front.http.get("/dashboard/why")
    assert {one["deployment"] for one in why.json()["decisions"]} <= {"chat", "embed", "cnn"}
    for name in ("../app.py", "%2e%2e%2fapp.py", "x"):
        assert (await front.http.get(f"/dashboard/{name}")).status_code == 404


async def _keep(page: Page, name: str) -> None:
    """For whoever looks at it."""
    await asyncio.to_thread(SCREENSHOTS.mkdir, parents=True, exist_ok=True)
    await page.screenshot(path=SCREENSHOTS / name)
