/* Messages between ranks of a host: a ring of entries, and a ring of slots for large payloads.
 *
 * csrc/point_to_point/ring_link.cpp. N - 1 senders, each with a ring of its own, and one receiver.
 * Each frame has its payload in its entry or in a slot. The rings are shorter than the real ones (16
 * entries, 4 slots), which only shortens the way to their ends. DIES: a sender, or the receiver,
 * dies at any moment, and the others notice it.
 *
 * Asserted: frames arrive in order, each with its own payload.
 *
 * Mutants: PUSHED_FIRST NO_ROOM_CHECK NO_SLOT_CHECK POPPED_FIRST STALE_ROOM
 */
#ifndef N
#define N 2
#endif
#define SENDERS (N - 1)
#define ENTRIES 2
#define SLOTS 1
#if N == 2
#define FRAMES 6
#else
#define FRAMES 3
#endif
#define NOBODY N
#define RECEIVER SENDERS

byte pushed[SENDERS];
byte popped[SENDERS];
byte slots_popped[SENDERS];
byte number[SENDERS * ENTRIES];
bool in_slot[SENDERS * ENTRIES];
byte payload[SENDERS * ENTRIES];
byte slot[SENDERS * SLOTS];

byte victim = NOBODY;
bool dead[N];
bool notice; /* a rank has noticed a death */

#define ENTRY(sender, i) ((sender) * ENTRIES + (i) % ENTRIES)
#define PLACE(sender, i) ((sender) * SLOTS + (i) % SLOTS)

proctype Sender(byte me) {
  byte mine = 0;
  byte known_popped = 0;
  byte slots_pushed = 0;
  bool large;
  {
    do
    :: mine == FRAMES -> break
    :: mine < FRAMES ->
       if
       :: large = false
       :: large = true
       fi;
#ifndef NO_ROOM_CHECK
       if
       :: mine - known_popped == ENTRIES ->
          if
          :: mine - popped[me] != ENTRIES -> known_popped = popped[me]
          :: dead[RECEIVER] || notice -> goto fail
          fi
       :: else
       fi;
#endif
#ifdef STALE_ROOM
       known_popped = mine; /* as if all had been popped */
#endif
       if
       :: large ->
#ifndef NO_SLOT_CHECK
          if
          :: slots_pushed - slots_popped[me] != SLOTS
          :: dead[RECEIVER] || notice -> goto fail
          fi;
#endif
#ifdef PUSHED_FIRST
          pushed[me]++;
#endif
          number[ENTRY(me, mine)] = mine;
          in_slot[ENTRY(me, mine)] = true;
          slot[PLACE(me, slots_pushed)] = mine;
          slots_pushed++
       :: else ->
#ifdef PUSHED_FIRST
          pushed[me]++;
#endif
          number[ENTRY(me, mine)] = mine;
          in_slot[ENTRY(me, mine)] = false;
          payload[ENTRY(me, mine)] = mine
       fi;
#ifdef PUSHED_FIRST
       mine++
#else
       mine++;
       pushed[me] = mine
#endif
    od;
    goto over;
fail:
    notice = true;
over:
    skip
  } unless { dead[me] }
}

proctype Receiver() {
  byte taken[SENDERS];
  byte slots_taken[SENDERS];
  byte total = 0;
  byte from;
  {
    do
    :: total == SENDERS * FRAMES -> break
    :: total < SENDERS * FRAMES ->
       if
       :: pushed[0] != taken[0] -> from = 0
#if SENDERS > 1
       :: pushed[1] != taken[1] -> from = 1
#endif
       :: dead[0] || notice -> goto fail
#if SENDERS > 1
       :: dead[1] -> goto fail
#endif
       fi;
#ifdef POPPED_FIRST
       popped[from]++;
#endif
       assert(number[ENTRY(from, taken[from])] == taken[from]);
       if
       :: in_slot[ENTRY(from, taken[from])] ->
          assert(slot[PLACE(from, slots_taken[from])] == taken[from]);
          slots_taken[from]++;
          slots_popped[from] = slots_taken[from]
       :: else -> assert(payload[ENTRY(from, taken[from])] == taken[from])
       fi;
       taken[from]++;
#ifndef POPPED_FIRST
       popped[from] = taken[from];
#endif
       total++
    od;
    goto over;
fail:
    notice = true;
over:
    skip
  } unless { dead[RECEIVER] }
}

active proctype Killer() {
  if
  :: victim != NOBODY -> dead[victim] = true
  :: true
  fi
}

init {
  byte rank = 0;
  atomic {
#ifdef DIES
    if
    :: victim = 0
    :: victim = RECEIVER
    fi;
#endif
    do
    :: rank == SENDERS -> break
    :: rank < SENDERS -> run Sender(rank); rank++
    od;
    run Receiver()
  }
}
