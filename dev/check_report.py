#!/usr/bin/env python3
"""
report.html in a real browser (make check-report). Tiny runs, one of them on a data set whose class and file names are
as hostile as names can be, each page opened from file:// in headless Chromium:

    nothing on the console, nothing asked of the network, no name that became markup
    curves, classes, pictures with boxes, attention and tables are there, with the numbers of log.txt
    the boxes that are found, missed and false are those that a matching written anew here finds
    wide and on a phone nothing is wider than the window; light and dark every text stands out from what is behind it

    python3 dev/check_report.py [--program ./train_detr] [--page report.html] [--screenshots DIR]

--page only looks at that page. Needs chromium (apt-get install chromium) and nothing of Python but its own library.
Ends with "N passed, N failed".
"""
import argparse
import base64
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TINY = ("--backbone tiny --enc_layers 1 --dec_layers 2 --dim_feedforward 64 --hidden_dim 32 --nheads 4 --num_queries 20 "
        "--short_side 64 --max_size 96 --num_workers 1 --lr 1e-3 --lr_backbone 1e-3").split()
CLASSES = ["<script>window.pwned = 1</script>", "</script><img src=x onerror=window.pwned=1>", "<!--<script>",
           "\"'&amp;`${window.pwned = 1}", "na\u00efve \u65e5\u672c \u2028\u202e\\u003c", "https://example.com/" + "long" * 60]
PICTURE = "a</script><script>window.pwned=1;'\"&<!--%d.jpg"
passed = failed = 0


def check(good, what):
    global passed, failed
    if good:
        passed += 1
    else:
        failed += 1
        print("FAILED:", what)


class Browser:
    """Headless Chromium, spoken to in DevTools' protocol over a pipe: JSON messages that end with a zero byte."""

    def __init__(self, profile):
        program = next((found for name in ("chromium", "chromium-browser", "google-chrome", "chrome")
                        if (found := shutil.which(name))), None)
        if not program:
            sys.exit("chromium is missing: apt-get install chromium")
        to_browser, self.output = os.pipe()
        self.input, from_browser = os.pipe()

        def descriptors():  # Chromium reads from 3 and writes to 4
            read, write = os.dup(to_browser), os.dup(from_browser)
            os.dup2(read, 3)
            os.dup2(write, 4)

        self.process = subprocess.Popen(
            [program, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run",
             "--disable-background-networking", f"--user-data-dir={profile}"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=descriptors, close_fds=False)
        os.close(to_browser)
        os.close(from_browser)
        self.number, self.buffer, self.events, self.session = 0, b"", [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(domain + ".enable")

    def message(self):
        while b"\0" not in self.buffer:
            piece = os.read(self.input, 1 << 20)
            if not piece:
                raise RuntimeError("the browser is gone")
            self.buffer += piece
        text, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(text)

    def call(self, method, **parameters):
        self.number += 1
        request = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            request["sessionId"] = self.session
        os.write(self.output, json.dumps(request).encode() + b"\0")
        while True:
            answer = self.message()
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def evaluate(self, script):
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"].get("description", script))
        return answer["result"].get("value")

    def open(self, path, width, dark):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        self.call("Emulation.setEmulatedMedia",
                  features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        until = time.monotonic() + 300
        while self.evaluate("document.readyState") != "complete":
            if time.monotonic() > until:
                raise RuntimeError(f"{path} does not load")
            time.sleep(0.05)
        self.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def screenshot(self, path):
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        picture = self.call("Page.captureScreenshot", captureBeyondViewport=True,
                            clip={"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1})
        path.write_bytes(base64.b64decode(picture["data"]))

    def close(self):
        self.session = None
        try:
            self.call("Browser.close")
        except (RuntimeError, OSError):
            pass
        self.process.wait(timeout=20)




# ----------------------------------------------------------------------------------------------------------------------
# Runs

def train(program, folder, *flags):
    """Returns the words of the command; the run's output is shown if it fails."""
    words = [program, "train", *flags] + ([] if "--resume" in flags else ["--output_dir", str(folder)])
    run = subprocess.run(words, capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
    if run.returncode != 0:
        sys.exit(f"{shlex.join(words)}\n{run.stdout}{run.stderr}")
    return words


def hostile_data(folder):
    """A COCO data set of eight pictures, one of which has a crowd."""
    pictures = sorted((ROOT / "data" / "bccd" / "JPEGImages").glob("*.jpg"))[:8]
    (folder / "annotations").mkdir(parents=True)
    images, annotations = [], []
    for i, picture in enumerate(pictures):
        name = PICTURE % i
        (folder / "val" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(picture, folder / "val" / name)
        images.append({"id": i, "file_name": name, "width": 640, "height": 480})
        for b in range(3):
            box = [40 + 150 * b, 60 + 30 * i, 120 + 10 * b, 100]
            annotations.append({"id": len(annotations) + 1, "image_id": i, "category_id": 1 + (i + b) % len(CLASSES),
                                "bbox": box, "area": box[2] * box[3], "iscrowd": int(i == b == 0)})
    categories = [{"id": c + 1, "name": name} for c, name in enumerate(CLASSES)]
    text = json.dumps({"images": images, "annotations": annotations, "categories": categories})
    for split in ("train", "val"):
        (folder / "annotations" / f"instances_{split}.json").write_text(text)
    (folder / "train").symlink_to(folder / "val")


# ----------------------------------------------------------------------------------------------------------------------
# One page

CONTRASTS = """
(() => {  // of every text its contrast to what is behind it (WCAG 2), the least of all with the text
    const light = ([r, g, b]) => [r, g, b].map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const colour = (text) => (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map((v, i) => v * (text.startsWith("color(") && i < 3 ? 255 : 1));
    let worst = [99, ""];
    const walk = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT);
    while (walk.nextNode()) {
        const node = walk.currentNode.parentElement;
        if (!walk.currentNode.data.trim() || !node.getClientRects().length || node.closest(".pane")) continue;
        let behind = node;
        while (behind && [0].includes(colour(getComputedStyle(behind).backgroundColor)[3])) behind = behind.parentElement;
        const style = getComputedStyle(node);
        const pair = [colour(node instanceof SVGElement ? style.fill : style.color),
                      colour(getComputedStyle(behind || document.body).backgroundColor)].map(light).sort((a, b) => b - a);
        const contrast = (pair[0] + 0.05) / (pair[1] + 0.05);
        if (contrast < worst[0]) worst = [contrast, walk.currentNode.data];
    }
    return worst;
})()"""


def overlap(a, b):
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    return both / (a[2] * a[3] + b[2] * b[3] - both)


def count_boxes(picture, threshold):
    """(found, missed, false): the best score first takes the free box of its class that it overlaps most."""
    free = [box for box in picture["truth"] if not box[5]]
    ignored = [box for box in picture["truth"] if box[5]]
    found = false = 0
    for box in picture["found"]:
        if box[5] < threshold:
            continue

        def near(boxes):
            fits = [(overlap(box[1:5], other[1:5]), other) for other in boxes if other[0] == box[0]]
            return max((fit for fit in fits if fit[0] >= 0.5), key=lambda fit: fit[0], default=None)
        if near(free):
            free.remove(near(free)[1])
            found += 1
        elif not near(ignored):
            false += 1
    return found, len(free), false


def check_looks(browser, page, name, screenshots):
    """What every page must be, whatever is on it."""
    for width in (1280, 390):
        for dark in (False, True):
            where = f"{name}, {width} pixels, {'dark' if dark else 'light'}"
            browser.open(page, width, dark)
            browser.evaluate("document.querySelectorAll('details').forEach((one) => one.open = true)")
            widest = browser.evaluate("document.documentElement.scrollWidth")
            check(widest <= width, f"{where}: {widest} pixels wide")
            contrast, text = browser.evaluate(CONTRASTS)
            check(contrast >= 4.5, f"{where}: a contrast of {contrast:.2f}: {text!r}")
            said = [event for event in browser.events if event["method"] in
                    ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")]
            check(not said, f"{where}: the console says {said[:1]}")
            asked = [event["params"]["request"]["url"] for event in browser.events
                     if event["method"] == "Network.requestWillBeSent"]
            others = [url for url in asked if not url.startswith("data:") and url != page.resolve().as_uri()]
            check(asked and not others, f"{where}: asks for {others[:1]}")
            if screenshots:
                browser.screenshot(screenshots / f"{name}-{width}-{'dark' if dark else 'light'}.png")
    check(browser.evaluate("window.pwned === undefined && document.scripts.length === 2"), f"{name}: a name became markup")
    html = re.sub("base64,[^\"]*", "", browser.evaluate("document.querySelector('main').outerHTML"))
    for word in ("NaN", "undefined", "[object", "Infinity"):
        check(word not in html, f"{name}: the page says {word}: {html[max(0, html.find(word) - 100):][:200]}")
    text = page.read_text()
    check(len(text) < 4e6, f"{name}: {len(text)} bytes")
    links = re.findall(r"(?:src|href|url|import|fetch)\W{0,3}https?:", text.split('id="data"')[0] + text.split("</script>")[-2])
    check(not links, f"{name}: links to {links}")


def check_content(browser, page, name, folder, words, class_names, title):
    """The numbers and pictures of a run that has evaluated."""
    browser.open(page, 1280, False)
    run = browser.evaluate("run")
    check(browser.evaluate("document.querySelector('h1').textContent") == f"DETR on {title}", f"{name}: title")
    check(shlex.split(browser.evaluate("document.querySelector('pre.command').textContent")) == words, f"{name}: command")

    log = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    rows = [dict(zip(run["log"]["keys"], row)) for row in run["log"]["rows"]]
    same = len(log) == len(rows) and all(abs(a[key] - b[key]) <= 1e-5 * abs(a[key]) for a, b in zip(log, rows)
                                         for key in run["log"]["keys"][:-1])
    check(same, f"{name}: the log's numbers")
    curves = browser.evaluate("[...document.querySelectorAll('#curves ~ .columns figure.chart')].map((figure) => "
                              "[figure.querySelector('b').textContent, [...figure.querySelectorAll('.plot path')].map("
                              "(path) => [path.dataset.name, path.getAttribute('d')])])")
    check(len(curves) >= 7, f"{name}: {len(curves)} charts")
    for chart, lines in curves[:8]:
        for line, path in lines:
            check(len(re.findall(r"[ML][\d.]+ [\d.]+", path)) == len(log), f"{name}: {chart}, {line}: {path}")
    loss = dict(curves)["Loss"]
    check([line for line, _ in loss] == ["training", "validation"], f"{name}: curves of the loss: {loss}")
    heights = [float(y) for y in re.findall(r"[\d.]+ ([\d.]+)", loss[0][1])]  # downwards
    for a, b, x, y in zip(log, log[1:], heights, heights[1:]):
        check((a["train_loss"] < b["train_loss"]) == (x > y), f"{name}: the curve of the loss goes the wrong way")
    said = browser.evaluate("""(() => {
        const figure = document.querySelector('.chart'), plot = figure.querySelector('.plot'), box = plot.getBoundingClientRect();
        plot.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + 60, clientY: box.top + 50}));
        return [...figure.querySelectorAll('.key b, .key .at')].map((one) => one.textContent); })()""")
    check(said[-1] == "epoch 1" and abs(float(said[0]) / log[0]["train_loss"] - 1) < 1e-3, f"{name}: pointed at: {said}")

    check(browser.evaluate("[...document.querySelectorAll('.name')].map((one) => one.textContent)") == class_names,
          f"{name}: names of the classes")
    with_truth = [one for one in run["evaluation"]["classes"] if one["boxes"]]
    for one in with_truth:
        mean = sum(one["precision"]) / 101
        check(abs(mean - one["ap50"]) < 1e-4, f"{name}: AP50 {one['ap50']} is not the mean precision {mean}")
        check(all(a >= b for a, b in zip(one["precision"], one["precision"][1:])), f"{name}: precision rises")
    check(abs(sum(one["ap"] for one in with_truth) / len(with_truth) - log[-1]["test_coco_eval_bbox"][0]) < 1e-5,
          f"{name}: the mean of the classes' AP is not AP")

    pictures = run["pictures"]
    check(browser.evaluate("[...document.querySelectorAll('img')].every((image) => image.naturalWidth > 100)"),
          f"{name}: a picture is not shown")
    check(browser.evaluate("document.querySelectorAll('.pictures figure').length") == len(pictures) > 0, f"{name}: pictures")
    for threshold in (0.05, 0.15, 0.3, 0.95):
        browser.evaluate(f"{{ const slider = document.querySelector('input[type=range]'); slider.value = {threshold};"
                         "slider.dispatchEvent(new Event('input')); }")
        for kind in ("found", "missed", "false"):
            place = ("found", "missed", "false").index(kind)
            wanted = [count_boxes(picture, threshold)[place] for picture in pictures]
            pane = 1 if kind == "missed" else 0
            shown = browser.evaluate("[...document.querySelectorAll('.pictures figure')].map((figure) => "
                                     f"figure.querySelectorAll('.pane')[{pane}].querySelectorAll('rect.{kind}').length)")
            check(shown == wanted, f"{name}: {kind} at {threshold}: {shown}, not {wanted}")

    layers = run["pictures"][0]["attention"]["layers"]
    for picture in pictures:
        attention = picture["attention"]
        cells, maps = attention["height"] * attention["width"], base64.b64decode(attention["maps"])
        check(len(maps) == cells * len(attention["peaks"]) and len(attention["peaks"]) == layers * len(attention["boxes"]) > 0,
              f"{name}: {picture['name']}: maps of attention")
        for i, peak in enumerate(attention["peaks"]):
            total = sum(maps[i * cells:(i + 1) * cells]) * peak / 255
            check(abs(total - 1) <= 0.5 * cells * peak / 255 + 1e-4, f"{name}: a map of attention adds up to {total}")
    drawn = """[...document.querySelectorAll('.maps canvas')].map((canvas) =>
        [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data].filter((_, i) => i % 4 === 3))"""
    first = browser.evaluate(drawn)
    check(len(first) == layers and all(max(alpha) >= 230 and min(alpha) < 230 for alpha in first), f"{name}: maps are drawn")
    browser.evaluate("[...document.querySelectorAll('.strip button')].pop().click()")
    browser.evaluate("[...document.querySelectorAll('.chips button')].pop().click()")
    check(browser.evaluate(drawn) != first, f"{name}: another query, the same maps")
    check(all(row["value"] >= 0 for row in run["times"]) and len(run["times"]) == 6, f"{name}: times {run['times']}")
    check(len(run["memory"]) >= 5 and run["peak_bytes"] > 1e6 and len(run["work"]) > 5, f"{name}: memory and work")
    check(browser.evaluate("document.querySelectorAll('#time ~ .columns tbody tr').length") ==
          len(run["times"]) + len(run["memory"]), f"{name}: tables of time and memory")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default="./train_detr")
    parser.add_argument("--page", type=Path)
    parser.add_argument("--screenshots", type=Path)
    options = parser.parse_args()
    if options.screenshots:
        options.screenshots.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="check_report.") as scratch:
        scratch = Path(scratch)
        browser = Browser(scratch / "profile")
        try:
            if options.page:
                check_looks(browser, options.page, "page", options.screenshots)
            else:
                check_runs(browser, scratch, options.program, options.screenshots)
        finally:
            browser.close()
    print(f"{passed} passed, {failed} failed")
    return failed != 0


def check_runs(browser, scratch, program, screenshots):
    bccd = ["--data", "data/bccd", "--train_split", "test", "--split", "val", "--batch_size", "8", *TINY]
    folder = scratch / "short"
    train(program, folder, *bccd, "--steps", "1")
    check_looks(browser, folder / "report.html", "before an epoch", screenshots)

    folder = scratch / "plain"
    words = train(program, folder, *bccd, "--epochs", "2")
    check_content(browser, folder / "report.html", "plain", folder, words, ["Platelets", "RBC", "WBC"], "data/bccd")
    words = train(program, folder, "--resume", str(folder), "--epochs", "3")
    check_looks(browser, folder / "report.html", "plain", screenshots)
    check_content(browser, folder / "report.html", "resumed", folder, words, ["Platelets", "RBC", "WBC"], "data/bccd")

    folder, data = scratch / "hostile", scratch / "d<" / "script><script>window.pwned=1;'\"&"
    hostile_data(data)
    words = train(program, folder, "--data", str(data), "--batch_size", "4", "--epochs", "4", "--decoder", "anchor",
                  "--class_loss", "focal", *TINY)
    check_looks(browser, folder / "report.html", "hostile", screenshots)
    check_content(browser, folder / "report.html", "hostile", folder, words, CLASSES, str(data))
    text = (folder / "report.html").read_text()
    check(text.count("<script") == 2 == text.count("</script"), "hostile: a name closes or opens a script element")


if __name__ == "__main__":
    sys.exit(main())
