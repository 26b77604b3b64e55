#!/usr/bin/env bash
# Process 1 of a node of the test cluster, in namespaces of its own: its name, network, memory file
# system and node-local disk, then slurmd. When it ends, everything on the node ends, as at a power cut.
set -euo pipefail
folder=$1 name=$2

hostname "$name"
mount --bind "$folder/hosts" /etc/hosts
mount --bind "$folder/etc" /etc/slurm # jobs with --export=NONE find the cluster by it
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs "$folder/local" # a disk that the nodes do not share
while [ ! -e "$folder/nodes/$name.plugged" ]; do sleep 0.02; done # its network card comes from outside
slurmd -D -b >"$folder/log/slurmd.$name.out" 2>&1 &
echo $! >"$folder/nodes/$name.slurmd" # as the node counts its processes
while :; do # slurmd may be killed and started again; what jobs leave behind ends as a child of this process
  sleep 3600 &
  wait $! || true
done
