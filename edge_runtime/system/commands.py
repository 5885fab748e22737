"""What `edge-runtime doctor` and `edge-runtime service` do: call `doctor.py` and `service.py`, print, return the exit code.

Not here: flags and help (`cli.py`). What only one command needs is imported inside it.
"""

from __future__ import annotations

from argparse import Namespace

from edge_runtime.console import note, print_json


def run_doctor(args: Namespace) -> int:
    """Print what is found on this machine and what to do; -> 1 where something is wrong."""
    from edge_runtime.system.doctor import examine, show

    findings = examine(args.config, args.state)
    return show(findings, as_json=args.json)


def run_service_print(args: Namespace) -> int:
    """Print the units that `service install` would write."""
    from edge_runtime.system.service import obstacle, this_machine, units
    from edge_runtime.system.service_units import Limits

    machine = this_machine()
    texts = units(args.config, Limits(args.memory_max, args.cpu_quota), machine, args.serve)
    if reason := obstacle(args.config, machine.python):
        note(f"`service install` would refuse: {reason}")
    print_json({"units": texts}) if args.json else print("\n".join(texts.values()), end="")
    return 0


def run_service_install(args: Namespace) -> int:
    """Install and start the service, and what answers beside it."""
    from edge_runtime.system.service import install
    from edge_runtime.system.service_units import NAME, Limits

    paths = install(args.config, Limits(args.memory_max, args.cpu_quota), args.serve)
    if args.json:
        print_json({"units": [str(path) for path in paths]})
    else:
        print(f"{paths[0]}: the service runs; journalctl -fu {NAME} shows what it does")
        for path in paths[1:]:
            print(f"{path}: answers on port {args.serve} as soon as a model is there; journalctl -fu {path.stem}")
    return 0


def run_service_uninstall(args: Namespace) -> int:
    """Stop and remove the service."""
    from edge_runtime.system.service import uninstall
    from edge_runtime.system.service_units import NAME, STATE

    removed = uninstall()
    if args.json:
        print_json({"removed": removed})
    elif removed:
        print(f"the service is removed; {STATE} and the user {NAME} stay: sudo rm -r {STATE} && sudo userdel {NAME}")
    else:
        print("there is no service to remove")
    return 0
