#!/usr/bin/env python3
"""systemctl for a machine that is a namespace: no systemd runs there, and starting one would take the host's cgroups.

Starts and stops what unit files say, one process each: ExecStart with its arguments, environment files, User, and
systemd's readiness protocol (sd_notify(3)) for Type=notify. Everything else of a unit is for a real systemd to prove.
"""
import os, pwd, re, shlex, signal, socket, sys, time

RECORDS = "/run/systemctl"
UNITS = ["/etc/systemd/system", "/lib/systemd/system"]
WANTS = "/etc/systemd/system/multi-user.target.wants"
LIMIT = 60


def fail(message, status=1):
    sys.exit((print(f"systemctl: {message}", file=sys.stderr), status)[1])


def is_masked(name):
    return os.path.realpath(f"{UNITS[0]}/{name}.service") == "/dev/null"


def path_of(name):
    if is_masked(name):
        fail(f"Unit {name}.service is masked.")
    for folder in UNITS:
        if os.path.exists(f"{folder}/{name}.service"):
            return f"{folder}/{name}.service"
    fail(f"Unit {name}.service not found.", 5)


def settings(name):
    found = {}
    for line in open(path_of(name)):
        key, equals, value = line.strip().partition("=")
        if equals and not key.startswith(("#", ";")):
            value = value.replace("%H", os.uname().nodename).replace("%p", name)
            found.setdefault(key, []).append(value)
    return found


def environment(unit):
    env = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
    for line in unit.get("Environment", []):
        env.update(word.split("=", 1) for word in shlex.split(line))
    for file in unit.get("EnvironmentFile", []):
        if not os.path.exists(file.lstrip("-")):
            if file.startswith("-"):
                continue
            fail(f"{file} is missing")
        for line in open(file.lstrip("-")):
            name, equals, value = line.strip().partition("=")
            if equals and not name.startswith(("#", ";")):
                env[name] = value.strip("\"'")
    return env


def pid_of(name):
    try:
        pid = int(open(f"{RECORDS}/{name}").read())
        # A zombie has ended; nobody but init reaps it.
        return None if open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] == "Z" else pid
    except (OSError, ValueError):
        return None


def start(name):
    unit = settings(name)
    if pid_of(name):
        return
    if not os.path.exists(f"{RECORDS}/{name}.loaded"):
        load(name)
    env = environment(unit)
    command = re.sub(r"\$(\w+)", lambda m: env.get(m.group(1), ""), unit["ExecStart"][-1])
    for kind, base in [("Runtime", "/run"), ("State", "/var/lib")]:
        for folder in unit.get(f"{kind}Directory", []):
            os.makedirs(f"{base}/{folder}", int(unit.get(f"{kind}DirectoryMode", ["755"])[-1], 8), exist_ok=True)
    os.makedirs(RECORDS, exist_ok=True)
    ready = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    place = f"{RECORDS}/{name}.notify"
    if os.path.exists(place):
        os.unlink(place)
    ready.bind(place)
    os.chmod(place, 0o777)
    notify = unit.get("Type", ["simple"])[-1] == "notify"
    if notify:
        env["NOTIFY_SOCKET"] = place
    pid = os.fork()
    if pid == 0:
        os.setsid()
        log = os.open(f"/var/log/{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if user := unit.get("User"):
            entry = pwd.getpwnam(user[-1])
            os.setgroups([])
            os.setgid(entry.pw_gid)
            os.setuid(entry.pw_uid)
        words = shlex.split(command)
        os.execvpe(words[0], words, env)
    with open(f"{RECORDS}/{name}", "w") as record:
        record.write(str(pid))
    ready.settimeout(0.2)
    end = time.monotonic() + LIMIT
    while notify:
        try:
            if b"READY=1" in ready.recv(4096):
                break
        except TimeoutError:
            pass
        if not pid_of(name):
            fail(f"Job for {name}.service failed: {open(f'/var/log/{name}.log').read()[-2000:]}")
        if time.monotonic() > end:
            fail(f"{name}.service is not ready after {LIMIT} s")


def stop(name):
    pid = pid_of(name)
    if pid:
        os.kill(pid, signal.SIGTERM)
        while pid_of(name):
            time.sleep(0.02)


def content(path):
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""


def load(name):
    os.makedirs(RECORDS, exist_ok=True)
    with open(f"{RECORDS}/{name}.loaded", "w") as record:
        record.write("" if is_masked(name) else content(path_of(name)))


# By content, for systemd's time stamps (unit_need_daemon_reload).
def is_outdated(name):
    loaded = f"{RECORDS}/{name}.loaded"
    return os.path.exists(loaded) and not is_masked(name) and content(loaded) != content(path_of(name))


def show(name, wanted):
    pid = pid_of(name)
    if wanted == "ActiveState":
        print("active" if pid else "inactive")
    elif wanted == "MainPID":
        print(pid or 0)
    elif wanted == "NeedDaemonReload":
        print("yes" if is_outdated(name) else "no")
    else:
        fail(f"property {wanted} is not known here")


def link(name):
    return f"{WANTS}/{name}.service"


def main(arguments):
    options = [a for a in arguments if a.startswith("-")]
    verb, *names = [a for a in arguments if not a.startswith("-")] or [""]
    if arguments[:2] == ["show", "--property"] and arguments[3:4] == ["--value"]:
        return show(arguments[4], arguments[2])
    if unknown := [o for o in options if o not in {"--now", "--quiet", "--no-block"}]:
        fail(f"option {unknown[0]} is not known here")
    for name in [n.removesuffix(".service") for n in names]:
        if verb == "start":
            start(name)
        elif verb == "stop":
            stop(name)
        elif verb == "restart":
            path_of(name)
            stop(name)
            start(name)
        elif verb == "enable":
            os.makedirs(WANTS, exist_ok=True)
            if not os.path.lexists(link(name)):
                os.symlink(path_of(name), link(name))
            if "--now" in options:
                start(name)
        elif verb == "disable":
            if os.path.lexists(link(name)):
                os.unlink(link(name))
            if "--now" in options:
                stop(name)
        elif verb == "is-active":
            sys.exit(0 if pid_of(name) else 3)
        elif verb == "is-enabled":
            state = "masked" if is_masked(name) else "enabled" if os.path.lexists(link(name)) else "disabled"
            if "--quiet" not in options:
                print(state)
            sys.exit(0 if state == "enabled" else 1)
        elif verb == "mask":
            os.symlink("/dev/null", f"{UNITS[0]}/{name}.service")
        else:
            fail(f"verb {verb} is not known here")
    if names:
        return
    if verb != "daemon-reload":
        fail(f"verb {verb} is not known here")
    for record in os.listdir(RECORDS) if os.path.isdir(RECORDS) else []:
        name, _, kind = record.partition(".")
        if kind == "loaded" and any(os.path.lexists(f"{folder}/{name}.service") for folder in UNITS):
            load(name)


main(sys.argv[1:])
