"""As much of curl as the lines of docs/services.md use, for a machine without it. What it does not know it refuses.

It prints the head of the answer and then the body, as curl does with `--include`, which the tests set for both.
"""

from __future__ import annotations

import argparse
import http.client
import sys
from urllib.parse import urlsplit


def main() -> None:
    parser = argparse.ArgumentParser(prog="curl", allow_abbrev=False)
    parser.add_argument("url")
    parser.add_argument("-X", dest="method")
    parser.add_argument("-H", dest="headers", action="append", default=[])
    parser.add_argument("-d", dest="form")
    parser.add_argument("--json")
    parser.add_argument("--oauth2-bearer")
    parser.add_argument("-i", action="store_true")
    parser.add_argument("-N", action="store_true")
    options = parser.parse_args()
    headers = {"Accept": "*/*", "User-Agent": "curl/stand-in"}
    body: str | None = None
    if options.json is not None:
        body, kind = options.json, "application/json"
        headers |= {"Content-Type": kind, "Accept": kind}
    elif options.form is not None:
        body = options.form
        headers["Content-Type"] = "application/x-www-form-urlencoded"
    if options.oauth2_bearer is not None:
        headers["Authorization"] = f"Bearer {options.oauth2_bearer}"
    for header in options.headers:
        name, _, value = header.partition(":")
        headers[name] = value.strip()
    url = urlsplit(options.url)
    connection = http.client.HTTPConnection(url.netloc, timeout=30)
    target = url.path + (f"?{url.query}" if url.query else "")
    connection.request(options.method or ("GET" if body is None else "POST"), target, body, headers)
    answer = connection.getresponse()
    head = "".join(f"{name}: {value}\r\n" for name, value in answer.getheaders())
    out = sys.stdout.buffer
    out.write(f"HTTP/1.1 {answer.status} {answer.reason}\r\n{head}\r\n".encode())
    out.flush()
    while part := answer.read1(65_536):
        out.write(part)
        out.flush()


if __name__ == "__main__":
    main()
