"""A headless Chromium that tests drive by hand: real mouse, keys and touch, over its DevTools protocol.

The browser reads commands from file descriptor 3 and answers on 4 (`--remote-debugging-pipe`), each message
one JSON text that ends in a zero byte, so that no port is opened and no package is needed.
"""

import base64
import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from select import select

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for path in map(shutil.which, NAMES) if path is not None), None)
QUIET = (
    "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
    "hide-scrollbars", "disable-background-networking", "disable-component-update", "disable-dev-shm-usage",
    "host-resolver-rules=MAP * ~NOTFOUND", "remote-debugging-pipe",
)  # fmt: skip
PATIENCE = 90.0
KEYS = {
    "ArrowRight": 39, "ArrowLeft": 37, "ArrowUp": 38, "ArrowDown": 40, "Home": 36, "End": 35,
    "PageUp": 33, "PageDown": 34, "Tab": 9,
}  # fmt: skip


class Browser:
    """One Chromium process; `open` gives a page of it."""

    def __init__(self, profile, *flags):
        low = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for pair in (os.pipe(), os.pipe()) for end in pair]
        (command_in, self.command), (self.answers, answer_out) = low[:2], low[2:]

        def wire():
            os.dup2(command_in, 3)
            os.dup2(answer_out, 4)

        self.process = subprocess.Popen(
            [BROWSER, *(f"--{name}" for name in QUIET), f"--user-data-dir={profile}", *flags, "about:blank"],
            preexec_fn=wire, pass_fds=(3, 4), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        os.close(command_in)
        os.close(answer_out)
        self.count, self.rest, self.events, self.front = 0, b"", [], None

    def send(self, method, session=None, **parameters):
        """Send a command and return its result; events that come before it are kept."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self.command, json.dumps(message).encode() + b"\0")
        while True:
            found = self.read()
            if found.get("id") == self.count:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']}")
                return found["result"]
            self.events.append(found)

    def read(self):
        """Return the next message of the browser."""
        while b"\0" not in self.rest:
            if not select([self.answers], [], [], PATIENCE)[0]:
                raise TimeoutError("the browser does not answer")
            part = os.read(self.answers, 1 << 20)
            if not part:
                raise EOFError("the browser has ended")
            self.rest += part
        text, self.rest = self.rest.split(b"\0", 1)
        return json.loads(text)

    def open(self, path, *, width=1280, height=900, dark=False, touch=False):
        """Open a file as a page and wait until its figures are drawn."""
        return Page(self, path, width, height, dark, touch)

    def close(self):
        """End the browser and whatever it started."""
        self.send("Browser.close")
        os.close(self.command)
        os.close(self.answers)
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Page:
    """One page: what it asked for and complained of, and hands to touch it with."""

    def __init__(self, browser, path, width, height, dark, touch):
        self.browser = browser
        self.target = browser.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.send("Target.attachToTarget", targetId=self.target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=touch)  # fmt: skip
        self.send("Emulation.setTouchEmulationEnabled", enabled=touch)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.address = path.as_uri()
        self.send("Page.navigate", url=self.address)
        self.wait("document.body?.dataset.ready === 'true'")

    def send(self, method, **parameters):
        """Send a command to this page, which must be in front to be touched: others draw no frames."""
        if self.browser.front != self.session:
            self.browser.front = self.session
            self.browser.send("Page.bringToFront", self.session)
        return self.browser.send(method, self.session, **parameters)

    def run(self, script):
        """Evaluate JavaScript and return its value; an exception there is one here."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"]["description"])
        return found["result"].get("value")

    def wait(self, condition):
        """Wait until a condition in JavaScript holds."""
        end = time.monotonic() + PATIENCE
        while not self.run(condition):
            if time.monotonic() > end:
                raise TimeoutError(f"{condition} never came true; {self.complaints()}")
            time.sleep(0.05)

    def complaints(self):
        """What the console and the page's own ears heard: errors, exceptions, refusals."""
        found = [self.run("document.body.dataset.problems ?? ''")]
        for event in self.events():
            detail = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                found.append(str(detail["exceptionDetails"]))
            if event["method"] == "Log.entryAdded" and detail["entry"]["level"] == "error":
                found.append(detail["entry"]["text"])
            if event["method"] == "Runtime.consoleAPICalled" and detail["type"] in ("error", "assert"):
                found.append(str(detail["args"]))
        return [text for text in found if text]

    def requests(self):
        """Every address that the page asked for but its own."""
        asked = [
            e["params"]["request"]["url"] for e in self.events() if e["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in asked if url != self.address and not url.startswith(("data:", "blob:"))]

    def events(self):
        return [event for event in self.browser.events if event.get("sessionId") == self.session]

    def text(self, selector):
        return self.run(f"document.querySelector({json.dumps(selector)}).textContent")

    def middle(self, selector):
        """Where an element is in the window, after it was scrolled to."""
        script = f"""(() => {{
            const node = document.querySelector({json.dumps(selector)});
            node.scrollIntoView({{block: "center", behavior: "instant"}});
            const box = node.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2];
        }})()"""
        return self.run(script)

    def mouse(self, kind, x, y, held=True):
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left" if held else "none",
                  buttons=int(held and kind != "mouseReleased"), clickCount=1)  # fmt: skip

    def drag(self, start, end, steps=8, look=lambda: None):
        """Press at one point, move to another, let go; return what `look` gave after each move."""
        self.mouse("mouseMoved", *start, held=False)
        self.mouse("mousePressed", *start)
        seen = []
        for step in range(1, steps + 1):
            share = step / steps
            self.mouse("mouseMoved", *(a + share * (b - a) for a, b in zip(start, end, strict=True)))
            seen.append(look())
        self.mouse("mouseReleased", *end)
        return seen

    def swipe(self, start, end, steps=8):
        """The same with a finger."""
        points = [
            [a + i / steps * (b - a) for a, b in zip(start, end, strict=True)] for i in range(steps + 1)
        ]
        for i, (x, y) in enumerate(points):
            kind = "touchMove" if i else "touchStart"
            self.send("Input.dispatchTouchEvent", type=kind, touchPoints=[{"x": x, "y": y}])
        self.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def press(self, key):
        """Press and release a key."""
        for kind in ("rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key])

    def picture(self, path, full=True):
        """Write a picture of the page."""
        found = self.send("Page.captureScreenshot", captureBeyondViewport=full)
        path.write_bytes(base64.b64decode(found["data"]))

    def close(self):
        self.browser.send("Target.closeTarget", targetId=self.target)
