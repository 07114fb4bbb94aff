#!/usr/bin/env python3
"""Makes the CUDA build of torch importable where there is no CUDA.

The registry's torch is linked against a dozen CUDA libraries: gigabytes, of which a CPU machine calls nothing. The loader
only wants each library and each symbol to exist. This writes one small library for each that is missing, with the symbols
(and their versions) that torch imports from it, into site-packages/nvidia/cu13/lib, which torch's libraries search. Every
stub returns 1, an error code. libcudart must be real (package nvidia-cuda-runtime): it is called at load.

    cuda_stubs.py [SITE_PACKAGES]     # needs a C compiler and readelf
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections import defaultdict
from pathlib import Path

# What the system or a real package provides; and libcuda, which only JIT compilation on a GPU opens.
NEVER = re.compile(r"lib(c|m|dl|rt|pthread|gcc_s|stdc\+\+|gomp|numa|cudart|cuda)\.so|ld-linux")
# Imports without a version that belong to one of the libraries.
LOOSE = re.compile(r"(cu|nccl|nvshmem|nvrtc)[A-Za-z]")
MARK = ".stub"


def read(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def needed(library: Path) -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(.+?)\]", read("readelf", "-dW", str(library)))


def providers(library: Path) -> dict[str, str]:
    """Symbol version to the library that must provide it."""
    found, library_name = {}, ""
    for line in read("readelf", "-VW", str(library)).splitlines():
        if match := re.search(r"File: (\S+)", line):
            library_name = match[1]
        elif library_name and (match := re.search(r"Name: (\S+)\s+Flags", line)):
            found[match[1]] = library_name
    return found


def symbols(library: Path):
    """(name, version or "", defined here) of each dynamic symbol."""
    for line in read("readelf", "--dyn-syms", "-W", str(library)).splitlines():
        fields = line.split()
        if len(fields) >= 8 and fields[0][:-1].isdigit():
            name, _, version = fields[7].partition("@")
            yield name, version.lstrip("@"), fields[6] != "UND"


def missing_libraries(libraries: list[Path], real: set[str]) -> dict[str, dict[str, set[str]]]:
    """Library to version to symbols, of all that torch imports and nobody provides."""
    missing: dict[str, dict[str, set[str]]] = {
        name: defaultdict(set)
        for library in libraries
        for name in needed(library)
        if name not in real and not NEVER.match(name)
    }
    defined, loose = set(), set()
    for library in libraries:
        versions = providers(library)
        for name, version, is_defined in symbols(library):
            if is_defined:
                defined.add(name)
            elif versions.get(version) in missing:
                missing[versions[version]][version].add(name)
            elif not version and LOOSE.match(name):
                loose.add(name)
    for name in loose - defined if missing else ():
        # Any library of the load may define it; the one that sounds like it is where a reader would look.
        def stem(library: str) -> str:
            return library.removeprefix("lib").split(".so")[0].split("_")[0].lower()

        likely = [library for library in missing if name.lower().startswith(stem(library))]
        missing[max(likely, key=len, default=min(missing))][""].add(name)
    return missing


def write(folder: Path, library: str, versions: dict[str, set[str]]) -> int:
    names = sorted(set().union(*versions.values()))
    with tempfile.TemporaryDirectory() as work:
        source, script = Path(work, "stub.c"), Path(work, "stub.map")
        source.write_text("".join(f"long {name}(void) {{ return 1; }}\n" for name in names) or "int nothing;\n")
        command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-w", "-fno-builtin", f"-Wl,-soname,{library}"]
        blocks = [
            f"{version} {{ global: {' '.join(f'{name};' for name in sorted(members))} }};"
            for version, members in sorted(versions.items())
            if version
        ]
        if blocks:
            script.write_text("\n".join(blocks) + "\n")
            command.append(f"-Wl,--version-script={script}")
        subprocess.run([*command, "-o", str(folder / library), str(source)], check=True)
    (folder / (library + MARK)).touch()
    return len(names)


def main() -> None:
    site = Path(sys.argv[1] if len(sys.argv) > 1 else sysconfig.get_paths()["platlib"])
    libraries = sorted(path for path in (site / "torch" / "lib").glob("*.so*") if path.is_file())
    if not libraries:
        sys.exit(f"there is no torch under {site}")
    present = {path.name for path in [*libraries, *(site / "nvidia").rglob("*.so*")]}
    stubs = {path.name.removesuffix(MARK) for path in (site / "nvidia").rglob("*" + MARK)}
    folder = site / "nvidia" / "cu13" / "lib"
    folder.mkdir(parents=True, exist_ok=True)
    missing = missing_libraries(libraries, present - stubs)
    count = sum(write(folder, library, versions) for library, versions in sorted(missing.items()))
    print(f"{len(missing)} stub libraries with {count} symbols in {folder}")


if __name__ == "__main__":
    main()
