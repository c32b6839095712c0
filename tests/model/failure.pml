/* A rank dies between any two steps, or gives up while it waits; the others hear of it.
 *
 * csrc/transport/{notice,window,liveness}.*, csrc/group/{group,execution}.cpp. Ranks fold in place.
 * One rank dies at any moment, or never (DIES); another gives up in one of its waits, or never
 * (GIVES_UP: a time-out, Ctrl-C). Who raises an error posts it, in two steps, and returns to its
 * caller, who overwrites the buffer.
 *
 * Asserted: a survivor that gets a result gets the right one; memory that may be another's by now
 * is not written. A survivor that waits for ever is an invalid end state.
 *
 * Mutants: NO_SOUND_CHECK SOUND_IS_POSTED CHANGE_FIRST COMPLETE_EARLY NO_LIFE_WORD NO_NOTICE
 *          NO_QUARANTINE
 */
#ifndef N
#define N 2
#endif
#ifndef OPS
#define OPS 2
#endif
#define NOBODY N
#define JUNK 99

#define VALUE(rank, op) ((op) * 4 + (rank) + 1)
#if N == 2
#define SUM(op) (VALUE(0, op) + VALUE(1, op))
#define SOMEBODY_DIED (dead[0] || dead[1])
#else
#define SUM(op) (VALUE(0, op) + VALUE(1, op) + VALUE(2, op))
#define SOMEBODY_DIED (dead[0] || dead[1] || dead[2])
#endif

/* The shared memory. */
byte sequence[N];
byte phase[N];
byte buffer[N * N]; /* by rank, then part */
byte notice;        /* 0, 1: being written, 2: readable */
bool dead[N];       /* the life word: the kernel sets it */

byte victim = NOBODY;
byte impatient = NOBODY;
bool reused[N]; /* the buffer's memory belongs to something else */

/* What ends a wait, but for what it waits for: Execution::check(). */
#ifdef NO_NOTICE
#define TOLD false
#else
#define TOLD (notice == 2)
#endif
#ifdef NO_LIFE_WORD
#define LOST false
#else
#define LOST SOMEBODY_DIED
#endif
#define GIVES_UP_NOW (me == impatient)

inline await(condition) {
  if
  :: condition
  :: TOLD -> goto fail
  :: LOST -> goto fail
  :: GIVES_UP_NOW -> goto fail
  fi
}

#ifdef NO_SOUND_CHECK
#define SOUND true
#else
#ifdef SOUND_IS_POSTED
#define SOUND (notice != 2)
#else
#define SOUND (notice == 0)
#endif
#endif

proctype Rank(byte me) {
  byte op = 1;
  byte peer = 0;
  byte sum = 0;
  {
    do
    :: op > OPS -> break
    :: op <= OPS ->
       d_step {
         peer = 0;
         do
         :: peer == N -> break
         :: peer < N -> buffer[me * N + peer] = VALUE(me, op); peer++
         od;
         peer = 0
       };
       if
       :: TOLD -> goto fail /* announce() looks first */
       :: else
       fi;
       sequence[me] = op;
       do
       :: peer == N -> break
       :: peer < N -> await(sequence[peer] >= op); peer++
       od;
       /* The fold, part by part. */
       peer = 0;
       sum = 0;
       do
       :: peer == N -> break
       :: peer < N -> atomic { sum = sum + buffer[peer * N + me]; peer++ }
       od;
#ifdef COMPLETE_EARLY
       phase[me]++;
#endif
       peer = 0;
       do
       :: peer == N -> break
       :: peer < N ->
          atomic { assert(!reused[peer]); buffer[peer * N + me] = sum; peer++ }
       od;
#ifndef COMPLETE_EARLY
       phase[me]++;
#endif
       /* Window::AllCompleted: and then nobody has failed meanwhile. */
       peer = 0;
       do
       :: peer == N -> break
       :: peer < N -> await(phase[peer] >= phase[me]); peer++
       od;
       await(SOUND);
       d_step { /* a result */
         peer = 0;
         do
         :: peer == N -> break
         :: peer < N -> assert(buffer[me * N + peer] == SUM(op)); peer++
         od;
         peer = 0
       };
       op++
    od;
    goto over;
fail:
#ifdef CHANGE_FIRST
    buffer[me * N + (me + 1) % N] = JUNK;
#endif
    if
    :: atomic { notice == 0 -> notice = 1 };
       notice = 2
    :: else
    fi;
    /* The caller has its error, and does with its memory what it likes. */
    d_step {
      peer = 0;
      do
      :: peer == N -> break
      :: peer < N -> buffer[me * N + peer] = JUNK; peer++
      od
    };
#ifdef NO_QUARANTINE
    reused[me] = true;
#endif
over:
    skip
  } unless { dead[me] }
}

/* A rank that dies may do so at any time, also when it has ended well. */
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
    :: victim = N - 1
    fi;
#endif
#ifdef GIVES_UP
    if
    :: impatient = 0
    :: impatient = 1
    fi;
#endif
    do
    :: rank == N -> break
    :: rank < N -> run Rank(rank); rank++
    od
  }
}
