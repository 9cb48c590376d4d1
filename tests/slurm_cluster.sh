#!/bin/bash
# A real Slurm cluster of several nodes on one Linux machine, for the tests.
#
# No systemd, no containers, no cgroups, no accounting database. Needs root and
#   apt-get install -y --no-install-recommends slurm-wlm munge iproute2 util-linux
#
# Each "node" is a set of namespaces: net (its own IP on a bridge), uts (its own hostname), mount (its own /etc/hosts, /dev/shm
# and munge socket), pid and ipc (`crash` kills every process of it, as pulling the plug would). slurmctld runs in the machine's
# own network namespace, so sbatch and squeue work from a normal shell.
#
#   slurm_cluster.sh start [N]    N nodes (default 2), and wait until they are idle
#   slurm_cluster.sh stop         end all, remove namespaces and bridge; may be repeated
#   slurm_cluster.sh crash I      kill everything on node nI
#   slurm_cluster.sh boot I       start node nI again
#   slurm_cluster.sh kill-daemon I  kill slurmd on node nI; what runs there goes on
#   slurm_cluster.sh daemon I     start slurmd on node nI again
#   slurm_cluster.sh kill-steps I kill everything on node nI but its daemons
#   slurm_cluster.sh unplug I     take node nI off the network
#   slurm_cluster.sh plug I       put it back
#   slurm_cluster.sh slow I P     from now on node nI gets P percent of one core (a cgroup); `boot` ends that
#
# SLURM_LAB: directory for state and logs; its etc/slurm.conf is what SLURM_CONF must name.
# SLURM_LAB_NET: first three numbers of the addresses; SLURM_LAB_TAG: prefix of interfaces. Two clusters need different ones.
set -u
LAB=${SLURM_LAB:?set SLURM_LAB to a directory}
NET=${SLURM_LAB_NET:-10.78.0}
TAG=${SLURM_LAB_TAG:-ct}
CPUS=4 MEM=8000
BR=${TAG}br0
export PATH=$PATH:/usr/sbin:/sbin SLURM_CONF=$LAB/etc/slurm.conf
SELF=$(readlink -f "$0")

die() { echo "slurm_cluster: $*" >&2; exit 1; }
nodes() { cat "$LAB/etc/nodes" 2>/dev/null || echo 0; }
# Running and not a zombie (a container's PID 1 may never reap).
alive() { local s; s=$(sed 's/.*) //; s/ .*//' "/proc/$1/stat" 2>/dev/null) && [ "$s" != Z ] && [ "$s" != X ]; }
# Pid files hold "pid starttime", so that a recycled pid is never killed.
started() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }
mine() {
  local p t; [ -r "$1" ] && read -r p t < "$1" || return 1
  alive "$p" && [ "$(started "$p")" = "$t" ] && echo "$p"
}
note() { echo "$1 $(started "$1")" > "$2"; }

write_conf() {
  local n=$1 i
  mkdir -p "$LAB"/{etc,log,run,state,local} || die "cannot write $LAB"
  chmod 755 "$LAB" "$LAB"/{etc,log,run,local}; chmod 700 "$LAB/state"
  echo "$n" > "$LAB/etc/nodes"
  (umask 077; [ -s "$LAB/etc/munge.key" ] || head -c 1024 /dev/urandom > "$LAB/etc/munge.key")
  { echo "127.0.0.1 localhost"; echo "$NET.1 ctl"
    for i in $(seq "$n"); do echo "$NET.$((10+i)) n$i"; done; } > "$LAB/etc/hosts"
  # A node reaches no DNS server; each reverse look-up (torch.distributed does one per socket) would hang for 10 s.
  printf '%s: files\n' passwd group shadow hosts networks protocols services > "$LAB/etc/nsswitch.conf"
  cat > "$SLURM_CONF" <<CONF
ClusterName=tests
SlurmctldHost=ctl($NET.1)
CommunicationParameters=NoCtldInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is also the time that a requeued job waits before it may start again (default 120 s).
AuthInfo=socket=$LAB/run/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation=$LAB/state
SlurmdSpoolDir=$LAB/local/%n-spool
SlurmctldPidFile=$LAB/run/slurmctld.pid
SlurmdPidFile=$LAB/run/slurmd-%n.pid
SlurmctldLogFile=$LAB/log/slurmctld.log
SlurmdLogFile=$LAB/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
RebootProgram=/bin/true
# The kernel of a CI machine may refuse to raise limits.
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1,sched_min_interval=0,bf_window=60
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=30
SlurmctldTimeout=5
MessageTimeout=10
TCPTimeout=2
BatchStartTimeout=30
KillWait=3
CompleteWait=0
UnkillableStepTimeout=30
InactiveLimit=0
MinJobAge=600
DefMemPerCPU=500
CONF
  for i in $(seq "$n"); do
    echo "NodeName=n$i NodeHostname=n$i NodeAddr=$NET.$((10+i)) CPUs=$CPUS RealMemory=$MEM State=UNKNOWN"
  done >> "$SLURM_CONF"
  cat >> "$SLURM_CONF" <<CONF
PartitionName=low  Nodes=ALL Default=YES PriorityTier=1  PreemptMode=REQUEUE GraceTime=20 MaxTime=INFINITE State=UP
PartitionName=high Nodes=ALL Default=NO  PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
CONF
}

inside() {   # the first process of a node's namespaces
  local h=$1
  hostname "$h"
  mount --bind "$LAB/etc/hosts" /etc/hosts
  mount --bind "$LAB/etc/nsswitch.conf" /etc/nsswitch.conf
  if [ "$h" != ctl ]; then
    mount -t tmpfs -o mode=1777 tmpfs /dev/shm
    mount --bind "$LAB/local/$h-run" "$LAB/run"
    ip link set lo up
  fi
  munged --force --num-threads=2 --key-file="$LAB/etc/munge.key" --socket="$LAB/run/munge.sock" \
    --pid-file="$LAB/run/munged.pid" --log-file="$LAB/log/munged-$h.log" --seed-file="$LAB/run/munged.seed"
  trap 'kill $(jobs -p) 2>/dev/null; wait; exit 0' TERM
  if [ "$h" = ctl ]; then slurmctld -D >> "$LAB/log/slurmctld.out" 2>&1 &
  else slurmd -D -N "$h" >> "$LAB/log/slurmd-$h.out" 2>&1 & fi
  while :; do wait; sleep 1 & wait $!; done   # stay, and reap orphans, also after the daemon has died
}

host_up() {
  local h=$1 i=${1#n} join=()
  if [ "$h" != ctl ]; then
    mkdir -p "$LAB/local/$h-run"; chmod 755 "$LAB/local/$h-run"; rm -f "$LAB/local/$h-run"/*
    if [ ! -e "/run/netns/$TAG-$h" ]; then
      ip netns add "$TAG-$h" || return 1
      ip link add "$TAG$h" type veth peer name eth0 netns "$TAG-$h"
      ip link set "$TAG$h" master "$BR" up
      ip -n "$TAG-$h" addr add "$NET.$((10+i))/24" dev eth0
      ip -n "$TAG-$h" link set eth0 up
      ip -n "$TAG-$h" link set lo up
      ip -n "$TAG-$h" route add default via "$NET.1"
    fi
    join=(nsenter "--net=/run/netns/$TAG-$h")
  fi
  setsid "${join[@]}" unshare --uts --mount --ipc --pid --fork --kill-child=KILL --mount-proc \
    "$SELF" __inside "$h" < /dev/null >> "$LAB/log/$h.init.log" 2>&1 &
  note $! "$LAB/run/$h.unshare"
}

host_down() {   # SIGKILL to unshare ends the namespace's first process, and so every process in it
  local p i k; p=$(mine "$LAB/run/$1.unshare") || { rm -f "$LAB/run/$1.unshare"; return 0; }
  k=$(cut -d' ' -f1 "/proc/$p/task/$p/children")
  kill -KILL "$p"
  for i in $(seq 100); do alive "$p" || { [ -n "$k" ] && alive "$k"; } || break; sleep 0.05; done
  rm -f "$LAB/run/$1.unshare"
  rmdir "$(cgroup "$1")" 2>/dev/null || true
}

cgroup() { if [ -d /sys/fs/cgroup/cpu ]; then echo "/sys/fs/cgroup/cpu/$TAG-$1"; else echo "/sys/fs/cgroup/$TAG-$1"; fi; }

processes() {   # of a node
  local p ns q
  p=$(mine "$LAB/run/$1.unshare") || die "$1 is not running"
  ns=$(readlink "/proc/$(cut -d' ' -f1 "/proc/$p/task/$p/children")/ns/pid")
  for q in /proc/[0-9]*; do [ "$(readlink "$q/ns/pid")" != "$ns" ] || echo "${q#/proc/}"; done 2>/dev/null
}

leader() { local p; p=$(mine "$LAB/run/$1.unshare") && cut -d' ' -f1 "/proc/$p/task/$p/children"; }

end_all() {   # on a node, with SIGKILL: the program $2, or all but those named by "not NAME..."
  local q name first; first=$(leader "$1") || die "$1 is not running"
  for q in $(processes "$1"); do
    name=$(cat "/proc/$q/comm" 2>/dev/null)
    [ "$q" != "$first" ] || continue
    case "$2" in
      "not "*) [[ " $2 " == *" $name "* ]] || kill -KILL "$q" 2>/dev/null;;
      *) [ "$name" != "$2" ] || kill -KILL "$q" 2>/dev/null;;
    esac
  done
  :    # a process may be gone before it is killed
}

slow() {
  local h=$1 percent=$2 dir q
  dir=$(cgroup "$h")
  [ -d /sys/fs/cgroup/cpu ] || echo +cpu > /sys/fs/cgroup/cgroup.subtree_control
  mkdir -p "$dir" || die "no cgroup can be made here"
  if [ -e "$dir/cpu.max" ]; then echo "$((percent * 200)) 20000" > "$dir/cpu.max"
  else echo 20000 > "$dir/cpu.cfs_period_us" && echo "$((percent * 200))" > "$dir/cpu.cfs_quota_us"; fi || die "no limit of CPU time here"
  for q in $(processes "$h"); do echo "$q" > "$dir/cgroup.procs"; done 2>/dev/null
}

idle() { sinfo -h -N -p low -t idle -o %N 2>/dev/null | wc -l; }

start() {
  local n=${1:-2} i
  [ "$(id -u)" = 0 ] || die "needs root (namespaces)"
  for i in munged slurmctld slurmd ip unshare nsenter; do command -v $i >/dev/null || die "$i is missing"; done
  ip link show "$BR" >/dev/null 2>&1 && die "bridge $BR exists: another cluster is running, or was cut off (stop it)"
  write_conf "$n"
  rm -rf "${LAB:?}"/{state,log,run,local}/*
  ip link add "$BR" type bridge && ip addr add "$NET.1/24" dev "$BR" && ip link set "$BR" up || die "this kernel allows no bridge"
  host_up ctl
  for i in $(seq "$n"); do host_up "n$i"; done
  for i in $(seq 300); do
    [ "$(idle)" = "$n" ] && return
    grep -qs 'fatal:' "$LAB"/log/*.out && break
    sleep 0.1
  done
  tail -n 5 "$LAB"/log/* >&2; die "the nodes did not come up"
}

stop() {
  local i
  for i in $(seq "$(nodes)"); do host_down "n$i"; done
  host_down ctl
  for i in $(ip netns list 2>/dev/null | cut -d' ' -f1 | grep "^$TAG-n[0-9]*$"); do ip netns del "$i"; done
  for i in $(ip -o link show type veth 2>/dev/null | sed -n "s/^[0-9]*: \($TAG\(n\)[0-9]*\)@.*/\1/p"); do ip link del "$i" 2>/dev/null; done
  ! ip link show "$BR" >/dev/null 2>&1 || ip link del "$BR"
}

case "${1:-}" in
  start) start "${2:-2}";;
  stop) stop;;
  crash) host_down "n$2";;
  unplug) ip link set "${TAG}n$2" down;;
  plug) ip link set "${TAG}n$2" up;;
  slow) slow "n$2" "$3";;
  kill-daemon) end_all "n$2" slurmd;;
  kill-steps) end_all "n$2" "not slurmd munged";;
  daemon) nsenter -t "$(leader "n$2")" -m -u -i -n -p slurmd -N "n$2";;
  boot) host_down "n$2"; host_up "n$2";;
  __inside) inside "$2";;
  *) sed -n '2,/^set -u/p' "$SELF" | sed '/^set -u/d; s/^# \{0,1\}//'; exit 2;;
esac
