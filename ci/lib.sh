# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=bash
# What ci/deps and ci/criu share: messages, and installing Debian or Ubuntu packages.

say() { printf '%s: %s\n' "${0##*/}" "$*"; }
die() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 1
}

# missing_packages NAME...: prints those that are not installed.
missing_packages() {
  local name
  for name in "$@"; do
    [[ $(dpkg-query -W -f='${db:Status-Status}' "$name" 2>/dev/null) == installed ]] ||
      printf '%s\n' "$name"
  done
}

# apt_install NAME...: installs what is missing; needs no network and no root when nothing is.
apt_install() {
  [[ -x /usr/bin/dpkg-query && -x /usr/bin/apt-get ]] ||
    die "this is not Debian or Ubuntu; install the equivalents of these packages by hand: $*"
  local missing
  mapfile -t missing < <(missing_packages "$@")
  ((${#missing[@]})) || return 0
  ((EUID == 0)) || die "packages are missing; as root: apt-get install ${missing[*]}"
  say "installing ${missing[*]}"
  local log
  log=$(mktemp)
  export DEBIAN_FRONTEND=noninteractive
  # The lists may be there and current: fetch them only when the install fails without.
  if ! apt-get -qq -y --no-install-recommends install "${missing[@]}" </dev/null >"$log" 2>&1; then
    if ! { apt-get -qq update && apt-get -qq -y --no-install-recommends install \
      "${missing[@]}"; } </dev/null >"$log" 2>&1; then
      tail -n 20 "$log" >&2
      rm -f "$log"
      die "apt-get could not install ${missing[*]} (its last lines are above)"
    fi
  fi
  rm -f "$log"
}
