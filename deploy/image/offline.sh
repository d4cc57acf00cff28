#!/usr/bin/env bash
# Build the image where no registry of images can be reached, from Debian's packages and pip's index: as root, with
# Debian's `buildah` and `mmdebstrap`. The certificates and pip's settings are this machine's, and torch pip's own choice.
set -euo pipefail
cd "$(dirname "$0")/../.."
SCRATCH=$(mktemp --directory)
trap 'rm -r "$SCRATCH"' EXIT

# In place of python:3.11-slim: Debian 13 like that, with the Python 3.11 of Debian 12. Its venv package depends on one that
# Debian 13 refuses, and is only files, so it is unpacked.
if ! buildah images evospec-base >/dev/null 2>&1; then
    mirror=http://deb.debian.org/debian
    # shellcheck disable=SC2016  # mmdebstrap's shell says what $1 is
    mmdebstrap --variant=minbase --include=ca-certificates,python3.11,python3-pip-whl,python3-setuptools-whl \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/man/*' \
        --customize-hook='chroot "$1" sh -c "ln -s python3.11 /usr/bin/python; cd /tmp; apt-get download python3.11-venv; dpkg-deb -x *.deb /; rm *.deb"' \
        trixie "$SCRATCH/base.tar" "deb $mirror trixie main" "deb $mirror bookworm main"
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$SCRATCH/base.tar" /
    buildah commit --quiet --rm "$container" evospec-base
fi

# pip looks for links in these places; they are the same in the container.
{ echo "[global]"; python3 -m pip config list | sed -nE "s/^(global|:env:)\.([a-z-]+)='(.*)'$/\2 = \3/p" | sort --unique; } >"$SCRATCH/pip.conf"
mounts=(--volume "$SCRATCH/pip.conf:/etc/pip.conf:ro")
for place in /etc/ssl/certs /usr/local/share/ca-certificates $(sed -nE 's/^(find-links|constraint) = (\/.*)$/\2/p' "$SCRATCH/pip.conf"); do
    mounts+=(--volume "$place:$place:ro")
done
export BUILDAH_FORMAT=docker # with a health check, which OCI's format has not
buildah build --isolation chroot --layers --ulimit "nofile=$(ulimit -Hn)" --ulimit "nproc=$(ulimit -Hu)" "${mounts[@]}" \
    --build-arg BASE=localhost/evospec-base --build-arg TORCH_INDEX_URL= --tag evospec .
