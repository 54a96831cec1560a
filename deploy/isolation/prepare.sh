#!/bin/sh
# prepare.sh HOME USER: the directories of a node whose modules are users of their own (docs/isolation.md).
#
# To be run as root, while no node runs there; may be run again. USER is the node's own. What root writes or starts
# from lies where only root can change it; `run` is shared, but nobody there can replace what is another's.
set -eu
home=$1
user=$2
group=$(id -g "$user")

install -d -o root -g "$group" -m 0751 "$home"
install -d -o root -g "$group" -m 3770 "$home/run"
install -d -o root -g "$group" -m 2750 "$home/log"
install -d -o "$user" -g "$group" -m 0711 "$home/bus"
install -d -o "$user" -g "$group" -m 0700 "$home/data" "$home/pki"
install -d -o root -g root -m 0711 "$home/homes"
install -d -o root -g root -m 0755 "$home/modules.d"

# Left by a node that ran here as one user: root may not open them where fs.protected_regular is set.
rm -f "$home"/run/*.lock "$home"/run/*.json "$home"/run/*.sock
