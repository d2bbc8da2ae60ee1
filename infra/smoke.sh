#!/usr/bin/env bash
# Build the image and start the topology of compose.yaml; lose a worker, with its disk, in the middle of a training; see
# an empty second one go on from what the first has saved when it was stopped, and everything cached the third time.
#   infra/smoke.sh                                            with Docker and its plugin compose
#   ENGINE=podman COMPOSE=podman-compose infra/smoke.sh       BUILD_OPTIONS go to the image's build
# What it makes is removed in the end, but for the image consistency-smoke.
set -euo pipefail
engine=${ENGINE:-docker}
read -ra compose <<< "${COMPOSE:-docker compose}"
project=consistency-smoke-$$ # two at once are two
export IMAGE=consistency-smoke:0.1.0
folder=$(mktemp -d)
checkout=$folder/checkout
compose+=(--project-name "$project" --file "$checkout/infra/compose.yaml" --file "$folder/smoke.yaml")

say() { printf '%s  %s\n' "$(date +%H:%M:%S)" "$*"; }
ask() { "${compose[@]}" run --rm -T --no-deps deploy python infra/smoke.py "$@"; }
tell() { # a failure inside `say "$(...)"` would go unnoticed
    local answer
    answer=$(ask "$@")
    say "$answer"
}
container() { "$engine" ps --all --quiet --filter "label=com.docker.compose.project=$project" \
    --filter "label=com.docker.compose.service=$1" | head -n 1; }
wait_for() { # SERVICE: until it is healthy, or has ended well if it runs once
    local state
    for _ in $(seq 100); do
        state=$("$engine" inspect --format '{{.State.Status}} {{.State.ExitCode}}' "$(container "$1")")
        case "$1 $state" in
            "buckets exited 0" | "deploy exited 0") return ;;
            buckets\ running* | deploy\ running*) ;;
            *\ running*) if "$engine" healthcheck run "$(container "$1")" > /dev/null 2>&1; then return; fi ;;
            *\ exited*) break ;;
        esac
        sleep 3
    done
    say "$1 is not ready: $state"
    exit 1
}
end() {
    [ "$1" = 0 ] || "${compose[@]}" logs --tail 40 || true
    "$engine" ps --all --quiet --filter "label=com.docker.compose.project=$project" | xargs --no-run-if-empty \
        "$engine" rm --force > /dev/null 2>&1 || true # what a step that was interrupted ran in goes as well
    "${compose[@]}" down --volumes > /dev/null 2>&1 || true
    rm -rf "$folder"
}
trap 'end $?' EXIT

# A clone: an image without .git records no revision, and what is not committed would not be in it.
git clone --quiet "$(dirname "$0")/.." "$checkout"
"$checkout/infra/make-secrets.sh"
cp "$checkout/infra/smoke-recipe.yaml" "$checkout/params/recipes/smoke.yaml"
git -C "$checkout" add --all
git -C "$checkout" -c user.name=smoke -c user.email=smoke@localhost commit --quiet --message "The recipe of the smoke test"
{ # ports stay closed; tiny networks on many threads wait for each other
    printf 'services:\n  prefect: {ports: !reset []}\n  mlflow: {ports: !reset []}\n'
    gpus=$(command -v nvidia-smi > /dev/null || echo 'deploy: !reset null')
    printf '  metrics:\n    ports: !reset []\n    %s\n' "$gpus"
    printf '  worker:\n    environment: {OMP_NUM_THREADS: "1"}\n    %s\n' "$gpus"
} > "$folder/smoke.yaml"

say "build"
if ! command -v nvidia-smi > /dev/null; then # any build of PyTorch will do
    BUILD_OPTIONS="${BUILD_OPTIONS:-} --build-arg TORCH=$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' "$checkout/requirements-cuda.lock")"
fi
# shellcheck disable=SC2086  # several options
"$engine" build ${BUILD_OPTIONS:-} --file "$checkout/infra/Dockerfile" --tag "$IMAGE" "$checkout" > "$folder/build.log" 2>&1 \
    || { tail -n 40 "$folder/build.log"; exit 1; }
differs=$("$engine" run --rm "$IMAGE" git status --porcelain)
[ -z "$differs" ] || { say "the image's checkout differs from its commit: $differs"; exit 1; }

say "start"
if [ "$engine" = docker ]; then
    "${compose[@]}" up --detach --wait
else # this compose does not wait for health
    for services in "postgres s3" buckets "prefect mlflow" deploy worker metrics; do
        # shellcheck disable=SC2086  # several services
        "${compose[@]}" up --detach --no-deps $services
        for service in $services; do wait_for "$service"; done
    done
fi

say "what a worker reaches"
"${compose[@]}" run --rm -T --no-deps worker cm doctor

run=$(ask submit)
tell trains "$run"
before=$SECONDS
"${compose[@]}" stop worker
code=$("$engine" inspect --format '{{.State.ExitCode}}' "$(container worker)")
say "the worker was stopped in $((SECONDS - before)) s with exit code $code"
[ "$code" = 0 ]
tell crashed "$run"
"$engine" rm --force --volumes "$(container worker)" > /dev/null
"$engine" volume rm "$("$engine" volume ls --quiet --filter "name=${project}_cache")" > /dev/null

say "a second worker, on an empty disk"
"${compose[@]}" up --detach --no-deps worker
tell resumed "$run"
again=$(ask submit)
tell cached "$again"
answer=$("${compose[@]}" run --rm -T --no-deps metrics python infra/smoke.py metrics)
say "$answer"
say "passed"
