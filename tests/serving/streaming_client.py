"""Streams completions one after the other until it is killed; says so on stdout when the first piece has come."""

import http.client
import json
import sys

BODY = json.dumps({
    "model": "stories", "prompt": "Once upon a time", "max_tokens": 480, "ignore_eos": True, "stream": True})

while True:
  connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=60)
  connection.request("POST", "/v1/completions", BODY, {"Content-Type": "application/json"})
  answer = connection.getresponse()
  while line := answer.readline():
    if line.startswith(b"data: {"):
      sys.stdout.write("streaming\n")
      sys.stdout.flush()
  connection.close()
