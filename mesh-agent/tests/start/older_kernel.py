"""Runs a command as on a kernel that refuses some commands of bpf(2) with EINVAL:
    older_kernel.py load:<program> | attach:<number of enum bpf_attach_type> -- command ...
By seccomp(2) with user notification: the command's bpf(2) calls wait until this process has looked at their attributes."""
import ctypes, errno, fcntl, os, select, struct, sys

libc = ctypes.CDLL(None, use_errno=True)
SECCOMP, BPF = {"x86_64": (317, 321), "aarch64": (277, 280)}[os.uname().machine]
PIDFD_OPEN, PIDFD_GETFD = 434, 438
PROG_LOAD, LINK_CREATE = 5, 28
# In union bpf_attr (include/uapi/linux/bpf.h) of each.
PROG_NAME, ATTACH_TYPE = slice(48, 64), 8

def iowr(number, size): return 3 << 30 | size << 16 | ord("!") << 8 | number
RECV, SEND, CONTINUE = iowr(0, 80), iowr(1, 24), 1

def system_call(*arguments):
    result = libc.syscall(*arguments)
    if result < 0: raise OSError(ctypes.get_errno(), "system call %d" % arguments[0])
    return result

def filter_bpf():
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in [
        (0x20, 0, 0, 0), (0x15, 0, 1, BPF), (0x06, 0, 0, 0x7FC00000), (0x06, 0, 0, 0x7FFF0000)])
    instructions = ctypes.create_string_buffer(code)
    program = ctypes.create_string_buffer(struct.pack("@HP", 4, ctypes.addressof(instructions)))
    return system_call(SECCOMP, 1, 8, program)

what, which = sys.argv[1].split(":")
command = sys.argv[3:]
to_parent, to_child = os.pipe(), os.pipe()
child = os.fork()
if child == 0:
    os.write(to_parent[1], b"%d" % filter_bpf())
    os.read(to_child[0], 1)
    os.execvp(command[0], command)
listener = system_call(PIDFD_GETFD, system_call(PIDFD_OPEN, child, 0), int(os.read(to_parent[0], 9)), 0)
os.write(to_child[1], b"x")

def is_refused(pid, number, address):
    if (number, what) not in ((PROG_LOAD, "load"), (LINK_CREATE, "attach")): return False
    with open("/proc/%d/mem" % pid, "rb", 0) as memory:
        memory.seek(address)
        attributes = memory.read(64)
    if what == "load": return attributes[PROG_NAME].rstrip(b"\0").decode() == which[:15]
    return struct.unpack_from("=I", attributes, ATTACH_TYPE)[0] == int(which)

poll = select.poll()
poll.register(listener, select.POLLIN)
while True:
    if any(event & select.POLLHUP for _, event in poll.poll()): break
    call = bytearray(80)
    try:
        fcntl.ioctl(listener, RECV, call)
        identity, pid, _, _, _, _, number, address = struct.unpack_from("=QIIiIQQQ", call)
        answer = (identity, 0, -errno.EINVAL, 0) if is_refused(pid, number, address) else (identity, 0, 0, CONTINUE)
        fcntl.ioctl(listener, SEND, struct.pack("=QqiI", *answer))
    except FileNotFoundError:
        pass  # It ended meanwhile.
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) % 256)
