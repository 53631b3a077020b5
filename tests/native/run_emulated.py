"""Runs the native test program on an emulated AVX-512 processor: Linux and the program alone, booted under Bochs.

For machines without AVX-512. An emulator shows that the instructions compute the right numbers and stay inside their
memory; it says nothing about speed. Not part of the test suite: it takes minutes and a kernel image.

    apt-get install bochs bochs-term bochsbios vgabios isolinux syslinux-common xorriso     # Debian's names
    apt-get download linux-image-6.1.0-56-cloud-amd64 && dpkg-deb -x linux-image-*.deb kernel
    cmake -G Ninja -S . -B build/static -DCAST_KERNELS_NATIVE_TESTS=ON -DCMAKE_EXE_LINKER_FLAGS=-static \
          -DOpenMP_gomp_LIBRARY=$(g++ -print-file-name=libgomp.a)
    cmake --build build/static
    python tests/native/run_emulated.py build/static/tests/native/native_tests kernel/boot/vmlinuz-*

Exits with 0 if the program ran at the level asked for and every check held.
"""

from __future__ import annotations

import argparse
import os
import pty
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ISOLINUX = Path("/usr/lib/ISOLINUX/isolinux.bin")
LDLINUX = Path("/usr/lib/syslinux/modules/bios/ldlinux.c32")

BOCHSRC = """
config_interface: textconfig
display_library: term
sound: driver=dummy
memory: guest=1024, host=1024
cpu: model={model}, count=1, ips=200000000, reset_on_triple_fault=0, ignore_bad_msrs=1
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
ata0-master: type=cdrom, path={work}/boot.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev={work}/serial.txt
log: {work}/bochs.txt
panic: action=fatal
error: action=ignore
info: action=ignore
"""


def cpio(entries: list[tuple[str, int, int, int, bytes]]) -> bytes:
    """An initramfs in cpio's `newc` format, of (name, mode, device major, minor, content)."""
    archive = b""
    for number, (name, mode, major, minor, content) in enumerate([*entries, ("TRAILER!!!", 0, 0, 0, b"")], 1):
        fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, major, minor, len(name) + 1, 0)
        archive += b"070701" + b"".join(b"%08X" % f for f in fields) + name.encode() + b"\0"
        archive += b"\0" * (-len(archive) % 4) + content
        archive += b"\0" * (-len(archive) % 4)
    return archive


def write_image(work: Path, program: Path, kernel: Path, arguments: list[str]) -> None:
    """A bootable CD of the kernel and an initramfs whose only process is the program."""
    folder = work / "cd" / "isolinux"
    folder.mkdir(parents=True)
    entries = [
        ("dev", 0o040755, 0, 0, b""),
        ("dev/console", 0o020600, 5, 1, b""),
        ("init", 0o100755, 0, 0, program.read_bytes()),
    ]
    (folder / "initrd").write_bytes(cpio(entries))
    shutil.copy(kernel, folder / "vmlinuz")
    shutil.copy(ISOLINUX, folder)
    shutil.copy(LDLINUX, folder)
    # The program is process 1, so its end is a kernel panic: the sign that the run is over.
    # Bochs 2.7 tells another size of compacted state than Linux computes, which would turn AVX off: do without.
    command = "console=ttyS0 loglevel=3 mitigations=off clearcpuid=xsaves,xsavec OMP_WAIT_POLICY=passive -- "
    command += " ".join(arguments)
    (folder / "isolinux.cfg").write_text(
        f"default test\nprompt 0\nlabel test\n kernel vmlinuz\n append initrd=initrd {command}\n"
    )
    subprocess.run(
        ["xorriso", "-as", "mkisofs", "-quiet", "-o", str(work / "boot.iso"), "-b", "isolinux/isolinux.bin", "-c",
         "isolinux/boot.cat", "-no-emul-boot", "-boot-load-size", "4", "-boot-info-table", str(work / "cd")],
        check=True,
    )  # fmt: skip


def drain(terminal: int) -> None:
    """Read the screen, or the emulator would wait for it."""
    while True:
        try:
            os.read(terminal, 65536)
        except OSError:  # the other end is closed
            return


def emulate(work: Path, model: str, limit: float) -> str:
    """What the machine wrote to its serial line until the program ended or the time was up."""
    (work / "bochsrc").write_text(BOCHSRC.format(work=work, model=model))
    serial, start = work / "serial.txt", time.monotonic()
    # Of the displays without a window, only `term` needs no client; it wants a terminal, and nobody looks at it.
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        ["bochs", "-f", str(work / "bochsrc")], stdin=theirs, stdout=theirs, stderr=theirs,
        env=os.environ | {"TERM": "xterm"}, start_new_session=True,
    ) as machine:  # fmt: skip
        threading.Thread(target=drain, args=(ours,), daemon=True).start()
        os.write(ours, b"c\n")  # builds with the debugger wait for `continue`
        shown = 0
        while machine.poll() is None and time.monotonic() - start < limit:
            time.sleep(2)
            text = serial.read_text(errors="replace") if serial.exists() else ""
            print(text[shown:], end="", flush=True)
            shown = len(text)
            if "Kernel panic" in text:
                break
        machine.kill()
    return serial.read_text(errors="replace") if serial.exists() else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path, help="statically linked native_tests")
    parser.add_argument("kernel", type=Path, help="a Linux kernel image with serial console and initramfs")
    parser.add_argument("--level", default="avx512")
    parser.add_argument("--model", default="corei7_skylake_x", help="a processor that `bochs --help cpu` lists")
    parser.add_argument("--limit", type=float, default=1500, help="seconds")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_image(work, given.program, given.kernel, ["--few", "--repeats", "2", "--level", given.level])
        start = time.monotonic()
        told = emulate(work, given.model, given.limit)
        print(f"\n{time.monotonic() - start:.0f} s on an emulated {given.model}")
        if f"level {given.level}" not in told or " checks, 0 failed" not in told:
            log = work / "bochs.txt"
            print(log.read_text(errors="replace")[-3000:] if log.exists() else "no log", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
