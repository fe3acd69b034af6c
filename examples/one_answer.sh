#!/bin/sh
# One answer as JSON lines, from a running server. Needs websocat.
echo '{"type":"generate","prompt":"The capital of France is","temperature":0,"max_tokens":8}' | websocat -n 'ws://127.0.0.1:41443/ws?once=1'
