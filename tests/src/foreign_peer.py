"""A peer of flannel's udp backend, written from its wire description alone: one raw IPv4 packet in each datagram.

usage: foreign_peer.py DEVICE LISTEN PORT CORRUPT SUBNET=ADDRESS...

A packet that the kernel routes to DEVICE goes to the ADDRESS of the SUBNET that its destination lies in, at PORT; a
datagram's payload goes to DEVICE. No batching, no offloads, no checks, as flanneld's own proxy. With CORRUPT = N every
Nth packet with more than 200 bytes leaves with its last byte changed, and with the checksums that it had.
"""

import fcntl
import os
import selectors
import socket
import struct
import sys

TUNSETIFF = 0x400454CA
IFF_TUN = 0x0001
IFF_NO_PI = 0x1000


def number(address):
    return struct.unpack("!I", socket.inet_aton(address))[0]


def main():
    device, listen, port, corrupt = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    routes = []
    for route in sys.argv[5:]:
        subnet, address = route.split("=")
        network, length = subnet.split("/")
        mask = 0xFFFFFFFF << (32 - int(length)) & 0xFFFFFFFF
        routes.append((number(network), mask, address))

    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", device.encode(), IFF_TUN | IFF_NO_PI))
    wire = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    wire.bind((listen, port))
    wire.setblocking(False)
    print("ready", flush=True)

    def to_wire(packet):
        if len(packet) < 20 or packet[0] >> 4 != 4:
            return
        destination = struct.unpack_from("!I", packet, 16)[0]
        for network, mask, address in routes:
            if destination & mask == network:
                try:
                    wire.sendto(packet, (address, port))
                except OSError:
                    pass
                return

    events = selectors.DefaultSelector()
    events.register(tun, selectors.EVENT_READ)
    events.register(wire, selectors.EVENT_READ)
    large = 0
    while True:
        for key, _ in events.select():
            try:
                if key.fileobj is wire:
                    os.write(tun, wire.recv(65535))
                    continue
                packet = os.read(tun, 65535)
            except (BlockingIOError, OSError):
                continue
            if corrupt and len(packet) > 200:
                large += 1
                if large % corrupt == 0:
                    packet = packet[:-1] + bytes([packet[-1] ^ 0xFF])
            to_wire(packet)


main()
