-- Tasks beside the calls of a ledger, in the guard's schema (:ns). Times are UTC microseconds of the server's clock.
-- `doc` is the whole task as JSON; the other columns are what a statement must find or decide by.
CREATE TABLE :ns.tasks (
  num bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  session text COLLATE "C" NOT NULL,
  id text COLLATE "C" NOT NULL,
  state text COLLATE "C" NOT NULL,
  lane text COLLATE "C" NOT NULL,                          -- type and what an agent must be able to do
  type text COLLATE "C" NOT NULL,
  priority integer NOT NULL,
  assignee text NOT NULL,
  parent text COLLATE "C" NOT NULL,
  open integer NOT NULL DEFAULT 0 CHECK (open >= 0),       -- dependencies that it still waits for
  due bigint NOT NULL,                                     -- not offered before; 0 once that has come
  claim text COLLATE "C" NOT NULL,
  lease double precision NOT NULL,
  until bigint NOT NULL,
  mono bigint NOT NULL,                                    -- of a machine's own clock: nothing here
  boot text NOT NULL,
  op text NOT NULL,
  said text NOT NULL,
  version bigint NOT NULL,
  hash text NOT NULL,
  doc text NOT NULL,
  UNIQUE (session, id),                                    -- prevents two tasks of one id
  CHECK (until = 0 OR state = 'assigned' OR state = 'active'))
  -- each claim leaves a dead entry at the head of the index of ready ones, past which the next one steps
  WITH (autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_cost_delay = 0);
CREATE INDEX ready_tasks ON :ns.tasks (session, lane, priority DESC, num)
  WHERE state = 'pending' AND open = 0 AND due = 0;
CREATE INDEX due_tasks ON :ns.tasks (session, due) WHERE state = 'pending' AND due > 0;
CREATE INDEX leased_tasks ON :ns.tasks (session, num) WHERE until > 0;
-- prevents two tasks of one claim: the same request, sent again, waits for what became of the first
CREATE UNIQUE INDEX claimed_tasks ON :ns.tasks (claim) WHERE until > 0 AND claim <> '';
CREATE INDEX tasks_by_age ON :ns.tasks (session, num);
CREATE INDEX tasks_by_state ON :ns.tasks (session, state);
CREATE INDEX parts_of_tasks ON :ns.tasks (session, parent) WHERE parent <> '';

-- the name under which a reader finds rows with their documents on every server
CREATE VIEW :ns.whole_tasks AS SELECT * FROM :ns.tasks;
CREATE TABLE :ns.task_deps (
  task bigint NOT NULL REFERENCES :ns.tasks (num),
  dep bigint NOT NULL REFERENCES :ns.tasks (num),
  on_failure text NOT NULL CHECK (on_failure IN ('skip', 'fail', 'run')),
  PRIMARY KEY (task, dep));
CREATE INDEX dependents_of_tasks ON :ns.task_deps (dep, task);

-- Whoever has read up to a `seq` has read all that come before it, and those of one task are in their order.
-- `seq` begins with the number of a transaction, so that its order is the order in which events become certain: a
-- reader that stops below the oldest open transaction never skips one. See `next_task_event`.
CREATE TABLE :ns.task_events (
  seq bigint PRIMARY KEY,
  session text COLLATE "C" NOT NULL,
  task text COLLATE "C" NOT NULL,
  n integer NOT NULL,
  kind text NOT NULL,
  from_state text NOT NULL,
  to_state text NOT NULL,
  actor text NOT NULL,
  source text NOT NULL,
  stage text NOT NULL,
  at bigint NOT NULL,
  data text NOT NULL,
  hash text NOT NULL,
  UNIQUE (session, task, n));                              -- prevents two stories of one task

CREATE FUNCTION :ns.refuse_change_of_task_event() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  RAISE EXCEPTION 'events of tasks are never changed or deleted' USING ERRCODE = 'restrict_violation';
END $$;
CREATE TRIGGER task_events_stay BEFORE UPDATE OR DELETE OR TRUNCATE ON :ns.task_events
  FOR EACH STATEMENT EXECUTE FUNCTION :ns.refuse_change_of_task_event();
ALTER TABLE :ns.task_events ENABLE ALWAYS TRIGGER task_events_stay;

-- what is taken off the numbers of transactions, so that those of events stay small; made anew with the
-- ledger, and where it was restored to a cluster that has counted less: see `_count_on`
CREATE FUNCTION :ns.task_base() RETURNS bigint LANGUAGE sql IMMUTABLE AS 'SELECT 0::bigint';

-- the number of the k-th event of this transaction, the place-th of its task. 24 bits stand below the transaction's
-- number: 20 count its events, 4 are for the following case. Two transactions wrote events of one task, and the later
-- one has the smaller number, because it began earlier and waited for the task: then its event follows the one before
-- it closely. That it is certain only with the greater number skips nothing: none is read while its own is open.
CREATE FUNCTION :ns.next_task_event(s text, t text, place integer, k integer) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
  mine bigint := ((pg_current_xact_id()::text::bigint - :ns.task_base()) << 24) + (k::bigint << 4);
  before bigint;
BEGIN
  IF place > 1 THEN
    SELECT seq INTO before FROM :ns.task_events WHERE session = s AND task = t AND n = place - 1;
  END IF;
  IF before IS NULL OR before < mine THEN
    RETURN mine;
  ELSIF before & 15 = 15 THEN
    RAISE EXCEPTION 'no number is left for event % of task %', place, t
      USING ERRCODE = 'serialization_failure', HINT = 'A new transaction has a greater number.';
  END IF;
  RETURN before + 1;
END $$;

-- those that no open transaction can precede any more
CREATE VIEW :ns.certain_task_events AS
  SELECT * FROM :ns.task_events
   WHERE seq < (pg_snapshot_xmin(pg_current_snapshot())::text::bigint - :ns.task_base()) << 24;

CREATE TABLE :ns.task_sessions (session text COLLATE "C" PRIMARY KEY, about text NOT NULL DEFAULT '{}');
CREATE TABLE :ns.task_workers (
  id text COLLATE "C" PRIMARY KEY,
  session text COLLATE "C" NOT NULL,
  started bigint NOT NULL,
  seen bigint NOT NULL,
  about text NOT NULL);
CREATE INDEX workers_by_age ON :ns.task_workers (session, started);
CREATE TABLE :ns.task_deliveries (
  num bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  session text COLLATE "C" NOT NULL,
  recipient text COLLATE "C" NOT NULL,
  channel text COLLATE "C" NOT NULL,
  key text COLLATE "C" NOT NULL,
  outcome text NOT NULL,
  why text NOT NULL,
  call text NOT NULL,
  at bigint NOT NULL,
  until bigint NOT NULL);
CREATE INDEX deliveries_by_key ON :ns.task_deliveries (session, channel, recipient, key);
CREATE INDEX deliveries_by_time ON :ns.task_deliveries (session, recipient, channel, at) WHERE outcome = 'sent';
CREATE INDEX open_deliveries ON :ns.task_deliveries (session, recipient, channel) WHERE until > 0;
