"""The dashboard in a real browser: each state in light and dark, on a desktop and a phone.

Screenshots are kept in `build/screenshots`.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from axe_playwright_python.async_playwright import Axe
from benchmarks.frontend.copies import Copies
from playwright.async_api import Browser, Page, async_playwright, expect

from dynamo_redis.names import EndpointName, InstanceId
from dynamo_redis.runtime.instance import Instance
from tests.frontend_deployment import Deployment

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
WITHIN_MS = 60_000
HOSTILE = "<script>document.title='taken'</script><img src=x onerror=document.title='taken'>"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium: apt-get install chromium")


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    # A sandbox needs another user than root.
    arguments = ["--no-sandbox"] if os.getuid() == 0 else []
    async with async_playwright() as playwright:
        opened = await playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield opened
        await opened.close()


@dataclass
class Looked:
    """A page of the dashboard. `faults` are what the browser complains of."""

    page: Page
    directory: Path
    faults: list[str] = field(default_factory=list)

    async def check(self, name: str) -> None:
        """Look at the page in each scheme and size: it fits, axe finds nothing; keep a screenshot."""
        for scheme in SCHEMES:
            await self.page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
            for device, (width, height) in SIZES.items():
                await self.page.set_viewport_size({"width": width, "height": height})
                await self.page.evaluate("new Promise(requestAnimationFrame)")
                assert await self.page.evaluate("document.documentElement.scrollWidth") <= width
                path = self.directory / f"{name}-{scheme}-{device}.png"
                await self.page.screenshot(path=path, full_page=True)
            found = await Axe().run(self.page)
            assert found.violations_count == 0, found.generate_report()
        assert self.faults == []


async def look(browser: Browser, url: str, repository: Path) -> Looked:
    directory = repository / "build" / "screenshots"
    directory.mkdir(parents=True, exist_ok=True)
    page = await browser.new_page()
    page.set_default_timeout(WITHIN_MS)
    looked = Looked(page, directory)
    page.on("pageerror", lambda error: looked.faults.append(str(error)))
    page.on("console", lambda line: looked.faults.append(line.text) if line.type == "error" else None)
    await page.goto(f"{url}/dashboard")
    return looked


async def until_titled(page: Page, title: str) -> None:
    await expect(page.get_by_role("heading", level=1)).to_have_text(title, timeout=WITHIN_MS)


async def test_page_shows_every_state(deployment: Deployment, browser: Browser, repository: Path) -> None:
    url = await deployment.frontend(router_mode="kv")
    looked = await look(browser, url, repository)
    page = looked.page
    await until_titled(page, "Not serving")
    await expect(page.get_by_text("No instance is registered.")).to_be_visible()
    await looked.check("empty")

    await deployment.worker(speedup_ratio=1)
    await until_titled(page, "Serving")
    answer = await page.request.post(
        f"{url}/v1/completions",
        data={"model": "demo", "prompt": "Hello! " * 40, "max_tokens": 20, "ignore_eos": True},
    )
    assert answer.ok
    await expect(page.get_by_text("of 1 in a minute")).to_be_visible(timeout=WITHIN_MS)
    rows = page.locator("#instances tbody tr")
    await expect(rows).to_have_count(1)
    await looked.check("one")

    copies = await Copies.of_a_worker(deployment.processes[-1].runtime.registry)
    await copies.put(999, lambda number: number >= 3)
    await until_titled(page, "Serving, with warnings")
    await expect(page.get_by_text("3 instances are not ready")).to_be_visible(timeout=WITHIN_MS)
    await page.set_viewport_size({"width": 1280, "height": 900})
    await expect(page.locator("#range")).to_have_text("1–20 of 1,000", timeout=WITHIN_MS)
    await expect(rows.first).to_contain_text("not ready")
    await looked.check("thousand")
    await use_by_keyboard(page)
    assert looked.faults == []


async def use_by_keyboard(page: Page) -> None:
    """Filter, order and turn the pages of a thousand instances, without a mouse."""
    await page.set_viewport_size({"width": 1280, "height": 900})
    rows, shown = page.locator("#instances tbody tr"), page.locator("#range")
    await page.keyboard.press("Tab")
    await expect(page.get_by_role("link", name="Skip to the status")).to_be_focused()
    assert await page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    await page.get_by_role("button", name="Next").focus()
    await page.keyboard.press("Enter")
    await expect(shown).to_have_text("21–40 of 1,000")
    await page.get_by_role("searchbox", name="Find").focus()
    await page.keyboard.type("10.0.3.25:")
    await expect(rows).to_have_count(1)
    await expect(rows).to_contain_text("10.0.3.25:7001")
    await page.keyboard.press("Control+A")
    await page.keyboard.press("Delete")
    await page.get_by_role("combobox", name="State").select_option("not ready")
    await expect(rows).to_have_count(3)
    tree = await page.locator("body").aria_snapshot()
    for words in (
        "banner", "main", "contentinfo", 'heading "Serving, with warnings" [level=1]', 'search "Instances"',
        'table "Instances that match the filter"', 'columnheader "State"', "- status: Serving, with warnings",
    ):  # fmt: skip
        assert words in tree, tree


async def test_hostile_names_are_shown_as_text(
    deployment: Deployment, browser: Browser, repository: Path
) -> None:
    """Names of the registry may hold anything, HTML too."""
    await deployment.worker(HOSTILE)
    url = await deployment.frontend()
    component = HOSTILE.replace(".", "·").replace("/", "∕")
    endpoint = EndpointName("dynamo", component, "generate")
    instance = Instance(endpoint, InstanceId(0x77), {"tcp": f"{HOSTILE}:1/x"})
    runtime = deployment.processes[-1].runtime
    await runtime.registry.put(endpoint.instance_key(0x77), instance.to_bytes())
    looked = await look(browser, url, repository)
    page = looked.page
    await until_titled(page, "Serving")
    await expect(page.locator("#models").get_by_text(HOSTILE[:30])).to_be_visible(timeout=WITHIN_MS)
    await expect(page.locator("#groups").get_by_text(component[:30])).to_be_visible(timeout=WITHIN_MS)
    assert await page.locator("main script, main img, main style").count() == 0
    assert re.match(r"Serving", await page.title())
    assert looked.faults == []


async def test_page_outlives_its_frontend(deployment: Deployment, browser: Browser, repository: Path) -> None:
    await deployment.worker()
    url = await deployment.frontend()
    looked = await look(browser, url, repository)
    await until_titled(looked.page, "Serving")
    await deployment.processes.pop().end()
    await until_titled(looked.page, "No connection to the frontend")
    await expect(looked.page.get_by_text("Below is the state of")).to_be_visible()
    await deployment.frontend(http_port=int(url.rpartition(":")[2]))
    await until_titled(looked.page, "Serving")


async def test_api_key_is_the_password_of_the_page(deployment: Deployment, browser: Browser) -> None:
    await deployment.worker()
    url = await deployment.frontend(http_api_key="a-key")
    page = await browser.new_page(http_credentials={"username": "any", "password": "a-key"})
    await page.goto(f"{url}/dashboard")
    await until_titled(page, "Serving")
