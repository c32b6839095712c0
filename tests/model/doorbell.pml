/* The doorbell: no ring is lost between a sleeper and those who ring.
 *
 * csrc/transport/doorbell.{h,cpp}, csrc/group/backoff.h. Two threads of one process sleep until
 * every ringer has stored its condition, twice. Stores wait in the storer's buffer until anything
 * flushes it: that is what the fences are about. Sleeps have no time limit here, so a lost wake-up
 * is an invalid end state.
 *
 * REFUSED: the sleepers' process cannot call membarrier; ringers fence.
 * Mutants: NO_FENCE TICKET_LATE RING_FIRST NO_SECOND_LOOK WAKE_ONE
 */
#ifndef N
#define N 2
#endif
#define RINGERS (N - 1)
#define SLEEPERS 2
#define ROUNDS 2

/* The shared memory. */
byte condition[RINGERS];
byte state;     /* how many sleepers are about */
byte rings;     /* the futex word */
bool asleep[SLEEPERS];

/* Store buffers: of each ringer its condition, of each sleeper what it adds to `state`. */
byte buffered[RINGERS];
short added[SLEEPERS];

#define FLUSH_RINGER(r) d_step { condition[r] = buffered[r] }
#define FLUSH_SLEEPER(i) d_step { state = state + added[i]; added[i] = 0 }

/* Stores take effect at some time by themselves, unless all is over. */
active proctype Buffers() {
  byte i;
end:
  do
  :: atomic { condition[0] != buffered[0] -> condition[0] = buffered[0] }
#if RINGERS > 1
  :: atomic { condition[1] != buffered[1] -> condition[1] = buffered[1] }
#endif
  :: atomic { added[0] != 0 -> state = state + added[0]; added[0] = 0 }
  :: atomic { added[1] != 0 -> state = state + added[1]; added[1] = 0 }
  od
}

inline change() {
  buffered[r] = round;
}

inline ring() {
#ifdef REFUSED
  /* `state` has kRingersFence set, so every ring is a slow one. */
#ifndef NO_FENCE
  FLUSH_RINGER(r);
#endif
#else
  if
  :: state != 0 -> FLUSH_RINGER(r) /* ring_slowly() fences in any case */
  :: else -> goto rung
  fi;
#endif
  if
  :: state != 0 ->
     rings++;
#ifdef WAKE_ONE
     if
     :: d_step { asleep[0] -> asleep[0] = false }
     :: d_step { asleep[1] -> asleep[1] = false }
     :: else
     fi
#else
     d_step { asleep[0] = false; asleep[1] = false }
#endif
  :: else
  fi;
rung:
  skip
}

proctype Ringer(byte r) {
  byte round = 1;
  do
  :: round > ROUNDS -> break
  :: round <= ROUNDS ->
#ifdef RING_FIRST
     ring();
     change();
#else
     change();
     ring();
#endif
     round++
  od
}

/* Looks at all conditions; they may change between two looks. */
inline look() {
  r = 0;
  do
  :: r < RINGERS && condition[r] >= round -> r++
  :: else -> break
  od
}

proctype Sleeper(byte me) {
  byte round = 1;
  byte r;
  byte ticket;
  do
  :: round > ROUNDS -> break
  :: round <= ROUNDS ->
     look();
     if
     :: r == RINGERS -> round++
     :: else ->
        /* listen() */
        atomic { added[me] == 0 -> added[me] = 1 };
#ifndef TICKET_LATE
        ticket = rings;
#endif
#if defined(REFUSED) || !defined(NO_FENCE)
        FLUSH_SLEEPER(me);
#endif
#if !defined(REFUSED) && !defined(NO_FENCE)
        d_step { /* membarrier: a fence in the midst of whatever the others do */
          r = 0;
          do
          :: r < RINGERS -> condition[r] = buffered[r]; r++
          :: else -> break
          od
        };
#endif
#ifdef NO_SECOND_LOOK
        r = 0;
#else
        look();
#endif
#ifdef TICKET_LATE
        ticket = rings;
#endif
        if
        :: r < RINGERS ->
           atomic { /* the kernel compares under a lock, and drains the caller's stores */
             FLUSH_SLEEPER(me);
             if
             :: rings == ticket -> asleep[me] = true
             :: else
             fi
           };
           !asleep[me]
        :: else
        fi;
        atomic { added[me] == 0 -> added[me] = -1 } /* leave() */
     fi
  od
}

init {
  atomic {
    byte i = 0;
    do
    :: i < RINGERS -> run Ringer(i); i++
    :: else -> break
    od;
    run Sleeper(0);
    run Sleeper(1)
  }
}
