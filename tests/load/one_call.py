"""A client that makes one call and waits for the answer; the soak kills it in the middle.

python one_call.py PORT < REQUEST.json, where the request holds "body" and "headers".
"""

from __future__ import annotations

import http.client
import json
import sys

asked = json.load(sys.stdin)
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=120)
connection.request("POST", "/mcp", json.dumps(asked["body"]), asked["headers"])
sys.stdout.write(connection.getresponse().read().decode())
