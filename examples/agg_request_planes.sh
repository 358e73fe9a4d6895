#!/bin/sh
# A whole deployment on one request plane: a Redis, a frontend and two mock workers. It sends one chat through
# it, prints the answer, and stops.
#
#   examples/agg_request_planes.sh --tcp | --http | --nats | --redis
#
# --nats uses the server at NATS_SERVER (default nats://localhost:4222). If none answers there, and the host is
# this machine, it starts `nats-server` on that port.
set -eu

usage() {
    echo "usage: $0 --tcp | --http | --nats | --redis"
}

case $#${1-} in
1--tcp | 1--http | 1--nats | 1--redis) plane=${1#--} ;;
1-h | 1--help) usage && exit 0 ;;
*) usage >&2 && exit 2 ;;
esac

for program in curl dynamo-redis; do
    command -v "$program" >/dev/null || {
        echo "$program is not installed, or not on PATH" >&2
        exit 1
    }
done

directory=$(mktemp -d)
: >"$directory/up.log"
deployment= nats=
stop() {
    status=$?
    trap - EXIT INT TERM
    # Not SIGINT: sh has its jobs ignore it.
    [ -z "$deployment" ] || { kill "$deployment" && wait "$deployment"; } || [ $status -ne 0 ] || status=1
    [ -z "$nats" ] || { kill "$nats" && wait "$nats"; } || true
    [ $status -eq 0 ] || tail -n 20 "$directory"/*.log >&2
    rm -rf "$directory"
    exit $status
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

answers() { # host and port of a URL
    python3 - "$1" <<'PY'
import socket, sys, urllib.parse
url = urllib.parse.urlsplit(sys.argv[1])
try:
    socket.create_connection((url.hostname, url.port or 4222), 1).close()
except OSError:
    sys.exit(1)
PY
}

if [ "$plane" = nats ]; then
    NATS_SERVER=${NATS_SERVER:-nats://localhost:4222}
    export NATS_SERVER
    if ! answers "$NATS_SERVER"; then
        case $NATS_SERVER in
        nats://localhost* | nats://127.0.0.1*) ;;
        *)
            echo "no NATS server answers at $NATS_SERVER" >&2
            exit 1
            ;;
        esac
        command -v nats-server >/dev/null || PATH=$PATH:/usr/sbin:/usr/local/sbin
        command -v nats-server >/dev/null || {
            echo "no NATS server answers at $NATS_SERVER, and nats-server is not installed" >&2
            exit 1
        }
        port=${NATS_SERVER##*:}
        nats-server --addr 127.0.0.1 --port "${port%%/*}" >"$directory/nats.log" 2>&1 &
        nats=$!
        until answers "$NATS_SERVER"; do
            kill -0 "$nats"
            sleep 0.1
        done
    fi
fi

DYN_REQUEST_PLANE=$plane dynamo-redis up --http-port 0 >"$directory/up.log" 2>&1 &
deployment=$!
until url=$(sed -n 's|.*curl \(http://[^/]*\)/v1/chat/completions.*|\1|p' "$directory/up.log") && [ -n "$url" ]; do
    kill -0 "$deployment"
    sleep 0.1
done

echo "A chat over the $plane plane:"
curl --silent --show-error --fail "$url/v1/chat/completions" -H 'Content-Type: application/json' \
    -d '{"model": "demo", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 32}'
echo
