"""Headless Chromium for tests, over its DevTools protocol on two pipes: no library needed."""

import base64
import itertools
import json
import os
import shutil
import subprocess
import time

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
PATIENCE = 60.0  # seconds for anything at all


class Browser:
    """One tab. ``messages`` are the errors and warnings of its console, ``requests`` its URLs."""

    def __init__(self, profile):
        reads, self._commands = os.pipe()
        self._replies, writes = os.pipe()
        # Chromium reads commands from descriptor 3 and writes to 4.
        script = f'exec "$0" "$@" 3<&{reads} 4>&{writes} 2>/dev/null'
        flags = [*FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", script, CHROMIUM, *flags], pass_fds=(reads, writes)
        )
        os.close(reads)
        os.close(writes)
        self._numbers, self._rest, self._session = itertools.count(1), b"", None
        self.messages, self.requests = [], []
        target = self._page()
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _page(self):
        return next(
            target["targetId"]
            for target in self.call("Target.getTargets")["targetInfos"]
            if target["type"] == "page"
        )

    def call(self, method, **parameters):
        number = next(self._numbers)
        command = {"id": number, "method": method, "params": parameters}
        if self._session:
            command["sessionId"] = self._session
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        return self._until(lambda reply: reply.get("id") == number)["result"]

    def _until(self, wanted):
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            while b"\0" in self._rest:
                text, self._rest = self._rest.split(b"\0", 1)
                reply = json.loads(text)
                self._note(reply)
                if wanted(reply):
                    assert "error" not in reply, reply["error"]
                    return reply
            self._rest += os.read(self._replies, 1 << 16)
        raise TimeoutError("Chromium did not answer")

    def _note(self, reply):
        method, about = reply.get("method"), reply.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.messages.append(json.dumps(about["exceptionDetails"])[:500])
        elif method == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning"):
            self.messages.append(json.dumps(about["args"])[:500])
        elif method == "Log.entryAdded":
            self.messages.append(about["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])

    def open(self, path, width=1280, height=900, dark=False):
        """Opens a file; returns after its load event."""
        self.messages.clear()
        self.requests.clear()
        phone = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=phone,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=path.resolve().as_uri())
        self._until(lambda reply: reply.get("method") == "Page.loadEventFired")

    def value(self, script):
        """What a piece of JavaScript evaluates to; promises are awaited."""
        options = {"returnByValue": True, "awaitPromise": True}
        result = self.call("Runtime.evaluate", expression=script, **options)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def screenshot(self, path):
        """A picture of the whole page."""
        shown = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shown["data"]))

    def close(self):
        os.close(self._commands)  # Chromium ends when its pipe does
        self._process.wait(10)
        os.close(self._replies)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()
