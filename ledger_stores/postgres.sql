-- The ledger in one PostgreSQL schema. Every operation that judges a call is one function: it takes a
-- lock on the call that ends with its transaction (safe behind a pooler), reads the rows as they are
-- then, judges, and writes. READ COMMITTED alone is not enough: a subselect sees a snapshot from before
-- the wait for a lock, each statement of a function sees a new one.
--
-- What need not judge takes no lock on the call: a first claim (the primary key lets one in), the
-- owner's settlement and renewal (one guarded UPDATE). The first two are plain statements, `_CLAIM` and
-- `_SETTLE` in postgres.py, which ask the functions here only when they change nothing. So whoever
-- closes or deletes a run that is open locks its row before it judges: see `latest`.
--
-- :ns stands for the schema's name. Times are UTC microseconds of the server's clock.

CREATE TABLE :ns.runs (
  id bigint GENERATED ALWAYS AS IDENTITY,
  call text COLLATE "C" NOT NULL,
  run integer NOT NULL CHECK (run > 0),
  tool text NOT NULL,
  wf text NOT NULL,
  caller text NOT NULL,
  owner text NOT NULL,
  key text,
  args text,
  matched text,
  started bigint NOT NULL,
  lease bigint NOT NULL,
  mono bigint NOT NULL DEFAULT 0,
  status text NOT NULL DEFAULT 'running'
    CHECK (status IN ('running', 'success', 'failed', 'suspended', 'doubt')),
  result text,
  error text,
  trace text,
  ended bigint,
  closed_by text,
  released integer NOT NULL DEFAULT 0,
  forced integer NOT NULL DEFAULT 0,
  late text,
  late_at bigint,
  blocked bigint NOT NULL DEFAULT 0,
  PRIMARY KEY (call, run),                               -- prevents two owners of one run
  CHECK ((status = 'running') = (closed_by IS NULL)));
-- prevents two open runs of a call, whatever a later bug does
CREATE UNIQUE INDEX one_live ON :ns.runs (call) WHERE status = 'running';
CREATE INDEX open_ends ON :ns.runs (status) WHERE status <> 'running' AND status <> 'success';
CREATE INDEX in_order ON :ns.runs (id);

-- `seq` begins with the number of the transaction, so that its order is the order in which events
-- become certain: a reader that stops below the oldest open transaction never skips one
CREATE TABLE :ns.events (
  seq bigint PRIMARY KEY,
  call text,
  run integer,
  kind text NOT NULL,
  at bigint NOT NULL,
  tool text,
  wf text,
  caller text,
  n bigint NOT NULL DEFAULT 1,
  detail text);

-- those that no open transaction can precede any more
CREATE VIEW :ns.certain_events AS
  SELECT * FROM :ns.events WHERE seq < pg_snapshot_xmin(pg_current_snapshot())::text::bigint * 4096;

CREATE TABLE :ns.tallies (
  call text COLLATE "C" PRIMARY KEY,
  tool text NOT NULL,
  wf text NOT NULL,
  caller text NOT NULL,
  args text,
  ran bigint NOT NULL,
  raised bigint NOT NULL,
  error text,
  created bigint NOT NULL,
  touched bigint NOT NULL);

CREATE TABLE :ns.processes (
  id text PRIMARY KEY, host text NOT NULL, pid bigint NOT NULL, boot text NOT NULL, space text NOT NULL,
  start text NOT NULL);

-- the last batch of counts that each writer wrote: one whose reply was lost is sent again
CREATE TABLE :ns.batches (writer text PRIMARY KEY, number bigint NOT NULL, at bigint NOT NULL);

-- calls that somebody waits for, in whatever process; lost in a crash, after which looking finds their ends
CREATE UNLOGGED TABLE :ns.waiting (call text COLLATE "C" PRIMARY KEY);

CREATE TABLE :ns.meta (name text PRIMARY KEY, value text);
INSERT INTO :ns.meta VALUES ('schema', '1');

CREATE FUNCTION :ns.now_us() RETURNS bigint LANGUAGE sql VOLATILE AS
  $$ SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint $$;

-- the number of the next event; up to 4095 in a transaction, counted in a setting that ends with it
CREATE FUNCTION :ns.next_event() RETURNS bigint LANGUAGE sql VOLATILE AS $$
  SELECT pg_current_xact_id()::text::bigint * 4096 + set_config('ledger.events',
    (COALESCE(NULLIF(current_setting('ledger.events', true), ''), '0')::integer + 1)::text, true)::integer $$;

CREATE FUNCTION :ns.note(r :ns.runs, kind text, at bigint, n bigint, detail text) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO :ns.events
  VALUES (:ns.next_event(), r.call, r.run, kind, at, r.tool, r.wf, r.caller, n, detail);
END $$;

-- number of the first run after the last success: runs that share it mean one effect
CREATE FUNCTION :ns.anchor(c text, before integer) RETURNS integer LANGUAGE sql STABLE AS $$
  SELECT COALESCE(MAX(run), 0) + 1 FROM :ns.runs
   WHERE call = c AND run < before AND (status = 'success' OR late = 'success') $$;

CREATE FUNCTION :ns.succeeded_since(r :ns.runs, horizon bigint) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
  SELECT r.released = 0 AND COALESCE(
    CASE WHEN r.status = 'success' THEN r.ended WHEN r.late = 'success' THEN r.late_at END > horizon, FALSE) $$;

-- whether a parameter named in match= is not what it was
CREATE FUNCTION :ns.differ(theirs text, ours text) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
  SELECT EXISTS (SELECT 1 FROM json_each_text(theirs::json) o JOIN json_each_text(ours::json) n USING (key)
                  WHERE o.value <> n.value) $$;

-- the newest run. Who may close it gets it locked, as its owner may settle or renew it at this moment
CREATE FUNCTION :ns.latest(c text) RETURNS :ns.runs LANGUAGE plpgsql AS $$
DECLARE
  last :ns.runs;
BEGIN
  SELECT * INTO last FROM :ns.runs WHERE call = c ORDER BY run DESC LIMIT 1;
  IF last.status = 'running' AND last.lease <= :ns.now_us() THEN
    SELECT * INTO last FROM :ns.runs WHERE call = c AND run = last.run FOR UPDATE;
  END IF;
  RETURN last;
END $$;

CREATE FUNCTION :ns.verdict(kind text, r :ns.runs, closed :ns.runs, anchor integer) RETURNS json
LANGUAGE sql IMMUTABLE AS $$
  SELECT json_build_object('kind', kind, 'row', CASE WHEN r.call IS NULL THEN NULL ELSE row_to_json(r) END,
    'closed', CASE WHEN closed.call IS NULL THEN NULL ELSE row_to_json(closed) END, 'anchor', anchor) $$;

CREATE FUNCTION :ns.claim(
  c text, token text, c_tool text, c_wf text, c_caller text, c_key text, c_args text, c_matched text,
  c_max integer, c_ttl bigint, c_lease bigint, on_doubt text, c_forced integer, seen_run integer,
  seen_owner text) RETURNS json LANGUAGE plpgsql AS $$
DECLARE
  now bigint;
  mine :ns.runs;
  last :ns.runs;
  won :ns.runs;
  closed :ns.runs;
  made :ns.runs;
  successes bigint;
  answered boolean;
BEGIN
  IF c_forced = 0 AND c_max = 1 AND c_ttl IS NULL THEN   -- most duplicates: a success that nothing can undo
    SELECT * INTO last FROM :ns.runs WHERE call = c ORDER BY run DESC LIMIT 1;
    IF last.status = 'success' AND last.released = 0 AND last.owner <> token THEN
      last.args := NULL;
      RETURN json_build_object('kind', 'done', 'row', last, 'anchor', 1);
    END IF;
  END IF;
  PERFORM pg_advisory_xact_lock(hashtextextended(':ns' || c, 0));
  last := :ns.latest(c);
  now := :ns.now_us();
  SELECT * INTO mine FROM :ns.runs WHERE call = c AND owner = token;
  IF FOUND THEN                                   -- the reply to my claim was lost
    IF mine.status <> 'running' THEN
      RETURN :ns.verdict('lost', mine, NULL, 1);
    END IF;
    UPDATE :ns.runs SET lease = now + c_lease WHERE call = c AND run = mine.run;
    RETURN json_build_object('kind', 'granted', 'run', mine.run, 'now', mine.started,
                             'anchor', :ns.anchor(c, mine.run));
  END IF;
  IF last.status = 'running' AND last.lease > now THEN
    RETURN :ns.verdict('live', last, NULL, 1);
  END IF;
  answered := last.released = 0 AND last.run = seen_run AND last.owner = seen_owner;
  IF c_forced = 0 THEN
    SELECT COUNT(*) INTO successes FROM :ns.runs r
     WHERE call = c AND :ns.succeeded_since(r, CASE WHEN c_ttl IS NULL THEN -1 ELSE now - c_ttl END);
    IF successes >= c_max THEN
      SELECT * INTO won FROM :ns.runs r
       WHERE call = c AND :ns.succeeded_since(r, CASE WHEN c_ttl IS NULL THEN -1 ELSE now - c_ttl END)
       ORDER BY run DESC LIMIT 1;
      RETURN :ns.verdict('done', won, NULL, 1);
    END IF;
    IF last.status IN ('running', 'doubt') AND last.released = 0 AND :ns.differ(last.matched, c_matched) THEN
      RETURN :ns.verdict('conflict', last, NULL, 1);
    END IF;
    IF last.status IN ('running', 'doubt') AND last.released = 0 AND on_doubt <> 'rerun'
       AND NOT COALESCE(last.run = seen_run AND last.owner = seen_owner, FALSE) THEN
      RETURN :ns.verdict(CASE on_doubt WHEN 'reconcile' THEN 'reconcile' ELSE 'doubt' END, last, NULL, 1);
    END IF;
  END IF;
  -- takeover: close what is still open, and answer or pass over a doubt
  IF last.status = 'running' THEN
    UPDATE :ns.runs SET status = CASE WHEN answered THEN 'failed' ELSE 'doubt' END, ended = now,
           closed_by = token, released = CASE WHEN answered THEN released ELSE GREATEST(released, c_forced) END
     WHERE call = c AND run = last.run RETURNING * INTO last;
    PERFORM :ns.note(last, last.status, now, 1, last.error);
    IF NOT COALESCE(answered, FALSE) THEN
      closed := last;
    END IF;
  ELSIF last.status = 'doubt' AND answered THEN
    UPDATE :ns.runs SET status = 'failed', ended = now, closed_by = token
     WHERE call = c AND run = last.run RETURNING * INTO last;
    PERFORM :ns.note(last, 'resolved', now, 0, 'reconcile: not done');
  ELSIF last.status = 'doubt' AND c_forced = 1 THEN
    UPDATE :ns.runs SET released = 1 WHERE call = c AND run = last.run;
  END IF;
  INSERT INTO :ns.runs (call, run, tool, wf, caller, owner, key, args, matched, started, lease, forced)
  VALUES (c, COALESCE(last.run, 0) + 1, c_tool, c_wf, c_caller, token, c_key, c_args, c_matched, now,
          now + c_lease, c_forced)
  RETURNING * INTO made;
  PERFORM :ns.note(made, 'claimed', now, 1, NULL);
  RETURN json_build_object('kind', 'granted', 'run', made.run, 'now', now, 'anchor', :ns.anchor(c, made.run),
                           'closed', CASE WHEN closed.call IS NULL THEN NULL ELSE row_to_json(closed) END);
END $$;

-- why a settlement changed nothing: it is written already, or the run was given up and this is its late end
CREATE FUNCTION :ns.settle_late(
  c text, token text, ending text, c_result text, c_error text, c_trace text) RETURNS json
LANGUAGE plpgsql AS $$
DECLARE
  now bigint;
  mine :ns.runs;
BEGIN
  PERFORM pg_advisory_xact_lock(hashtextextended(':ns' || c, 0));
  now := :ns.now_us();
  SELECT * INTO mine FROM :ns.runs WHERE call = c AND owner = token;
  IF NOT FOUND THEN
    RETURN :ns.verdict('gone', NULL, NULL, 1);
  END IF;
  IF mine.status = 'running' THEN                 -- a claim whose reply was lost does not know its run
    UPDATE :ns.runs SET status = ending, ended = now, closed_by = token, result = c_result, error = c_error,
           trace = c_trace
     WHERE call = c AND run = mine.run RETURNING * INTO mine;
    PERFORM :ns.note(mine, ending, now, 1, c_error);
    PERFORM :ns.wake(c);
    RETURN :ns.verdict('settled', mine, NULL, 1);
  END IF;
  IF mine.closed_by = token THEN                  -- the reply to my own settle was lost
    RETURN :ns.verdict('settled', mine, NULL, 1);
  END IF;
  IF mine.late IS NULL AND (mine.status = 'doubt' AND ending IN ('success', 'failed')
                            OR mine.status = 'failed' AND ending = 'success') THEN
    UPDATE :ns.runs SET late = ending, late_at = now, error = COALESCE(NULLIF(error, ''), c_error),
           result = CASE WHEN ending = 'success' AND result IS NULL THEN c_result ELSE result END
     WHERE call = c AND run = mine.run RETURNING * INTO mine;
    PERFORM :ns.note(mine, 'late', now, (ending = 'success')::integer, ending);
    PERFORM :ns.wake(c);
  END IF;
  RETURN :ns.verdict('late', mine, NULL, 1);
END $$;

CREATE FUNCTION :ns.renew(c text, n integer, token text, c_lease bigint) RETURNS json
LANGUAGE plpgsql AS $$
BEGIN
  UPDATE :ns.runs SET lease = :ns.now_us() + c_lease
   WHERE call = c AND run = n AND owner = token AND status = 'running';
  RETURN :ns.verdict(CASE WHEN FOUND THEN 'renewed' ELSE 'lost' END, NULL, NULL, 1);
END $$;

CREATE FUNCTION :ns.release(
  c text, token text, seen_run integer, seen_owner text, c_max integer, c_ttl bigint, why text) RETURNS json
LANGUAGE plpgsql AS $$
DECLARE
  now bigint;
  last :ns.runs;
BEGIN
  PERFORM pg_advisory_xact_lock(hashtextextended(':ns' || c, 0));
  last := :ns.latest(c);
  now := :ns.now_us();
  IF last.call IS NULL THEN
    RETURN :ns.verdict('nothing', NULL, NULL, 1);
  ELSIF last.run <> seen_run OR last.owner <> seen_owner THEN
    RETURN :ns.verdict('used', last, NULL, 1);
  ELSIF last.status = 'running' AND last.lease > now THEN
    RETURN :ns.verdict('live', last, NULL, 1);
  END IF;
  IF last.status = 'running' THEN
    UPDATE :ns.runs SET status = 'doubt', ended = now, closed_by = token, released = 1
     WHERE call = c AND run = last.run;
    PERFORM :ns.note(last, 'doubt', now, 1, last.error);
  ELSE
    UPDATE :ns.runs SET released = 1 WHERE call = c AND run = last.run;
  END IF;
  -- after a forced run that failed, the success before it still blocks
  UPDATE :ns.runs SET released = 1 WHERE call = c AND run IN (
    SELECT run FROM :ns.runs r
     WHERE call = c AND run < last.run
       AND :ns.succeeded_since(r, CASE WHEN c_ttl IS NULL THEN -1 ELSE now - c_ttl END)
     ORDER BY run OFFSET c_max - 1);
  PERFORM :ns.note(last, 'released', now, 0, why);
  RETURN :ns.verdict('released', last, NULL, 1);
END $$;

CREATE FUNCTION :ns.resolve(
  c text, token text, seen_run integer, seen_owner text, done boolean, c_result text, reconciled boolean,
  why text) RETURNS json LANGUAGE plpgsql AS $$
DECLARE
  now bigint;
  last :ns.runs;
  made :ns.runs;
BEGIN
  PERFORM pg_advisory_xact_lock(hashtextextended(':ns' || c, 0));
  last := :ns.latest(c);
  now := :ns.now_us();
  IF last.call IS NULL THEN
    RETURN :ns.verdict('nothing', NULL, NULL, 1);
  ELSIF last.run <> seen_run OR last.owner <> seen_owner THEN
    RETURN :ns.verdict('used', last, NULL, 1);
  ELSIF last.status = 'running' AND last.lease > now THEN
    RETURN :ns.verdict('live', last, NULL, 1);
  ELSIF last.status NOT IN ('running', 'doubt') OR (reconciled AND last.released = 1) THEN
    RETURN :ns.verdict('settled', last, NULL, 1);
  END IF;
  UPDATE :ns.runs SET status = CASE WHEN done THEN 'success' ELSE 'failed' END, ended = now,
         closed_by = token, released = 0, result = CASE WHEN done THEN c_result ELSE result END
   WHERE call = c AND run = last.run RETURNING * INTO made;
  IF last.status = 'running' THEN
    PERFORM :ns.note(made, made.status, now, 1, made.error);
  END IF;
  PERFORM :ns.note(made, 'resolved', now,
    (done AND last.status = 'doubt' AND last.late IS DISTINCT FROM 'success')::integer, why);
  PERFORM :ns.wake(c);
  RETURN :ns.verdict('resolved', last, NULL, 1);
END $$;

CREATE FUNCTION :ns.reset_call(c text, asked bigint) RETURNS json LANGUAGE plpgsql AS $$
DECLARE
  now bigint;
  last :ns.runs;
BEGIN
  PERFORM pg_advisory_xact_lock(hashtextextended(':ns' || c, 0));
  last := :ns.latest(c);
  now := :ns.now_us();
  IF last.call IS NULL THEN
    RETURN :ns.verdict('nothing', NULL, NULL, 1);
  ELSIF last.status = 'running' AND last.lease > now THEN
    RETURN :ns.verdict('live', last, NULL, 1);
  ELSIF last.started > asked THEN
    RETURN :ns.verdict('used', last, NULL, 1);
  END IF;
  DELETE FROM :ns.runs WHERE call = c;
  PERFORM :ns.note(last, 'reset', now, 0, NULL);
  RETURN :ns.verdict('reset', last, NULL, 1);
END $$;

-- tell those who wait for this call, if anybody did: NOTIFY for nobody would cost every settle
CREATE FUNCTION :ns.wake(c text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  IF EXISTS (SELECT FROM :ns.waiting WHERE call = c) THEN   -- cheaper than to delete nothing
    DELETE FROM :ns.waiting WHERE call = c;
    PERFORM pg_notify(':ns', c);
  END IF;
END $$;

-- forget every call of a workflow (NULL: of all); the one that lives if there is one, and nothing is forgotten
CREATE FUNCTION :ns.reset_scope(c_wf text, asked bigint, by_force boolean, why text) RETURNS json LANGUAGE plpgsql AS $$
DECLARE
  alive :ns.runs;
BEGIN
  LOCK TABLE :ns.runs IN SHARE ROW EXCLUSIVE MODE;   -- no claim can come between the look and the deletion
  SELECT * INTO alive FROM :ns.runs
   WHERE status = 'running' AND lease > :ns.now_us() AND (c_wf IS NULL OR wf = c_wf) LIMIT 1;
  IF FOUND AND NOT by_force THEN
    RETURN :ns.verdict('live', alive, NULL, 1);
  END IF;
  DELETE FROM :ns.runs WHERE (c_wf IS NULL OR wf = c_wf) AND call NOT IN (
    SELECT call FROM :ns.runs WHERE started > asked);
  DELETE FROM :ns.tallies WHERE c_wf IS NULL OR wf = c_wf;
  INSERT INTO :ns.events (seq, kind, at, wf, n, detail)
  VALUES (pg_current_xact_id()::text::bigint * 4096 + 1, 'reset', :ns.now_us(), c_wf, 0,
          COALESCE(NULLIF(why, ''), CASE WHEN c_wf IS NULL THEN 'everything' END));
  RETURN :ns.verdict('reset', NULL, NULL, 1);
END $$;

-- attempts that ran nothing, all in one statement: one for each would cost more than what is counted.
-- Rows are locked in the order of calls, so that two writers never cross. A call that was reset has none.
CREATE FUNCTION :ns.count_blocked(items json, now bigint) RETURNS void LANGUAGE sql
-- a plan that was made for an empty table would read a full one
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
  WITH asked AS MATERIALIZED (
    SELECT item->>0 AS call, (item->>1)::integer AS run, SUM((item->>8)::bigint)::bigint AS n,
           array_agg(place) AS places, array_agg(item->>5) AS callers, array_agg((item->>8)::bigint) AS times,
           array_agg(item->>7) AS errors
      FROM json_array_elements(items) WITH ORDINALITY AS found(item, place) WHERE item->>2 = 'blocked'
     GROUP BY 1, 2),
  held AS MATERIALIZED (
    SELECT asked.* FROM asked JOIN :ns.runs r ON r.call = asked.call AND r.run = asked.run
     ORDER BY r.call, r.run FOR UPDATE OF r),
  counted AS (
    UPDATE :ns.runs r SET blocked = blocked + held.n FROM held WHERE r.call = held.call AND r.run = held.run
    RETURNING r.call, r.run, r.tool, r.wf, places, callers, times, errors)
  INSERT INTO :ns.events
  SELECT pg_current_xact_id()::text::bigint * 4096 + 2048 + place, call, run, 'blocked', now, tool, wf, caller, n,
         error
    FROM counted, unnest(places, callers, times, errors) AS each(place, caller, n, error) $$;

-- counted attempts: [[call, run, kind, tool, wf, caller, args, error, n], …], sorted by call; at most 2,000
CREATE FUNCTION :ns.count(who text, batch bigint, items json) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  now bigint := :ns.now_us();
  item json;
  what :ns.runs;
  times bigint;
BEGIN
  INSERT INTO :ns.batches AS b VALUES (who, batch, now)
  ON CONFLICT (writer) DO UPDATE SET number = EXCLUDED.number, at = now WHERE b.number < EXCLUDED.number;
  IF NOT FOUND THEN
    RETURN;
  END IF;
  PERFORM :ns.count_blocked(items, now);
  FOR item IN SELECT one FROM json_array_elements(items) AS one WHERE one->>2 <> 'blocked' LOOP
    what.call := item->>0; what.run := (item->>1)::integer; what.tool := item->>3; what.wf := item->>4;
    what.caller := item->>5;
    times := (item->>8)::bigint;
    INSERT INTO :ns.tallies VALUES (what.call, what.tool, what.wf, what.caller, item->>6,
      CASE WHEN item->>2 = 'ran' THEN times ELSE 0 END, CASE WHEN item->>2 = 'ran' THEN 0 ELSE times END,
      item->>7, now, now)
    ON CONFLICT (call) DO UPDATE SET ran = tallies.ran + EXCLUDED.ran,
      raised = tallies.raised + EXCLUDED.raised, error = EXCLUDED.error, touched = now;
    PERFORM :ns.note(what, item->>2, now, times, item->>7);
  END LOOP;
END $$;
