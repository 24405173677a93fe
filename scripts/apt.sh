# Sourced by the setup scripts, which define say(): system packages where installing them needs no question.

apt_install() { # install Debian packages without asking; true when they are there afterwards
  local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends) log
  command -v apt-get >/dev/null || return 1
  if [ "$(id -u)" != 0 ]; then
    sudo -n true 2>/dev/null || return 1
    apt=(sudo -n "${apt[@]}")
  fi
  say "installing the system packages $*"
  log=$(mktemp)
  if "${apt[@]}" install "$@" >"$log" 2>&1 ||
    { "${apt[@]}" update >"$log" 2>&1 && "${apt[@]}" install "$@" >"$log" 2>&1; }; then
    rm -f "$log"
  else
    tail -n 3 "$log" >&2
    rm -f "$log"
    return 1
  fi
}
