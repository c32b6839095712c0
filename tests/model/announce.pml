/* Operations of a group inside one host: announce, compare, fold, complete.
 *
 * csrc/transport/window.cpp, csrc/collectives/{open,all_reduce_window}.cpp. Odd operations fold what
 * every rank shows beside its announcement (fold_shown), even ones fold in place, a part for each
 * rank (fold_in_place). One rank, or none, makes a different call at some operation. A rank's
 * signature here is one number.
 *
 * Asserted: what a rank reads is what the peer wrote for this operation; nobody folds before all
 * have announced; results are right; a mismatch is raised on all ranks, before any buffer of that
 * operation was written. Ranks that wait for ever are invalid end states.
 *
 * Mutants: ONE_SLOT SEQUENCE_FIRST WAIT_FOR_ONE NO_MEETING COMPLETE_EARLY COMPARE_WITH_FIRST
 *          COMPARE_LATE
 */
#ifndef N
#define N 2
#endif
#define OPS 4
#define NOBODY N

#define VALUE(rank, op) ((op) * 4 + (rank) + 1)
#if N == 2
#define SUM(op) (VALUE(0, op) + VALUE(1, op))
#else
#define SUM(op) (VALUE(0, op) + VALUE(1, op) + VALUE(2, op))
#endif

#ifdef ONE_SLOT
#define SLOT(rank, op) ((rank) * 2)
#else
#define SLOT(rank, op) ((rank) * 2 + (op) % 2)
#endif
#define IN_PLACE(op) ((op) % 2 == 0)

/* The shared memory. */
byte sequence[N * 2];
byte signature[N * 2];
byte payload[N * 2];
byte phase[N];
byte buffer[N * N]; /* by rank, then part */
bool notice;

/* What only the assertions know. */
byte announced[N];
bool raised[N];
byte different_rank = NOBODY;
byte different_op = 0;

inline announce() {
#ifdef SEQUENCE_FIRST
  sequence[SLOT(me, op)] = op;
#endif
  payload[SLOT(me, op)] = VALUE(me, op);
  signature[SLOT(me, op)] = op;
  if
  :: me == different_rank && op == different_op -> signature[SLOT(me, op)] = 100
  :: else
  fi;
#ifdef SEQUENCE_FIRST
  announced[me] = op
#else
  atomic { sequence[SLOT(me, op)] = op; announced[me] = op }
#endif
}

inline await_announced() {
  peer = 0;
  do
  :: peer == N -> break
  :: peer < N ->
     if
     :: sequence[SLOT(peer, op)] == op
     :: notice -> goto fail
     fi;
#ifdef COMPARE_WITH_FIRST
     if :: peer == 0 -> goto_if_different() :: else fi;
#endif
#if !defined(COMPARE_WITH_FIRST) && !defined(COMPARE_LATE)
     goto_if_different();
#endif
#ifdef WAIT_FOR_ONE
     if :: peer != me -> break :: else fi;
#endif
     peer++
  od
}

inline goto_if_different() {
  if
  :: signature[SLOT(peer, op)] != signature[SLOT(me, op)] -> goto fail
  :: else
  fi
}

inline check_all_announced() {
  d_step {
    peer = 0;
    do
    :: peer == N -> break
    :: peer < N -> assert(announced[peer] >= op); peer++
    od;
    peer = 0
  }
}

inline fold_shown() {
  peer = 0;
  sum = 0;
  do
  :: peer == N -> break
  :: peer < N ->
     atomic {
       assert(payload[SLOT(peer, op)] == VALUE(peer, op));
       sum = sum + payload[SLOT(peer, op)];
       peer++
     }
  od;
  assert(sum == SUM(op))
}

inline fold_in_place() {
  peer = 0;
  sum = 0;
  do
  :: peer == N -> break
  :: peer < N ->
     atomic {
       assert(buffer[peer * N + me] == VALUE(peer, op));
       sum = sum + buffer[peer * N + me];
       peer++
     }
  od;
#ifdef COMPLETE_EARLY
  phase[me]++;
#endif
  peer = 0;
  do
  :: peer == N -> break
  :: peer < N ->
     atomic {
       assert(different_op != op || different_rank == NOBODY); /* nothing is overwritten */
       buffer[peer * N + me] = sum;
       peer++
     }
  od;
#ifndef COMPLETE_EARLY
  phase[me]++
#endif
}

inline await_completed() {
  peer = 0;
  do
  :: peer == N -> break
  :: peer < N ->
     if
     :: phase[peer] >= phase[me]
     :: notice -> goto fail
     fi;
     peer++
  od
}

proctype Rank(byte me) {
  byte op = 1;
  byte peer = 0;
  byte sum = 0;
  do
  :: op > OPS -> break
  :: op <= OPS ->
     if
     :: IN_PLACE(op) ->
        d_step {
          peer = 0;
          do
          :: peer == N -> break
          :: peer < N -> buffer[me * N + peer] = VALUE(me, op); peer++
          od;
          peer = 0
        }
     :: else
     fi;
     if
     :: notice -> goto fail
     :: else
     fi;
     announce();
     await_announced();
     skip; /* no loop may end in front of a d_step */
     check_all_announced();
     if
     :: IN_PLACE(op) ->
        fold_in_place();
#ifndef NO_MEETING
        await_completed();
#endif
        skip;
        d_step {
          peer = 0;
          do
          :: peer == N -> break
          :: peer < N -> assert(buffer[me * N + peer] == SUM(op)); peer++
          od;
          peer = 0
        }
     :: else -> fold_shown()
     fi;
#ifdef COMPARE_LATE
     peer = 0;
     do
     :: peer == N -> break
     :: peer < N -> goto_if_different(); peer++
     od;
#endif
     assert(different_op != op || different_rank == NOBODY); /* else it went unnoticed */
     peer = 0;
     op++
  od;
  goto over;
fail:
  /* A rank that is slow in seeing the operation before end hears of it there. */
  assert(different_rank != NOBODY && (op == different_op || op + 1 == different_op));
  raised[me] = true;
  notice = true;
over:
  skip
}

init {
  byte rank = 0;
  if
  :: different_rank = NOBODY
  :: different_rank = 0
  :: different_rank = N - 1
  fi;
  if
  :: different_rank == NOBODY
  :: different_rank != NOBODY -> if :: different_op = 2 :: different_op = 3 fi
  fi;
  atomic {
    do
    :: rank == N -> break
    :: rank < N -> run Rank(rank); rank++
    od
  };
  _nr_pr == 1;
  if
  :: different_rank == NOBODY
  :: different_rank != NOBODY ->
     rank = 0;
     do
     :: rank == N -> break
     :: rank < N -> assert(raised[rank]); rank++
     od
  fi
}
