-- Tasks beside the calls of a ledger. Times are UTC microseconds. `task_docs` has the whole task as JSON; the columns
-- of `tasks` are what a statement must find or decide by.
CREATE TABLE tasks (
  num INTEGER PRIMARY KEY,
  session TEXT NOT NULL,
  id TEXT NOT NULL,
  state TEXT NOT NULL,
  lane TEXT NOT NULL,                                      -- type and what an agent must be able to do
  type TEXT NOT NULL,
  priority INTEGER NOT NULL,
  assignee TEXT NOT NULL,
  parent TEXT NOT NULL,
  open INTEGER NOT NULL DEFAULT 0 CHECK (open >= 0),       -- dependencies that it still waits for
  due INTEGER NOT NULL,                                    -- not offered before; 0 once that has come
  claim TEXT NOT NULL,
  lease REAL NOT NULL,
  until INTEGER NOT NULL,
  mono INTEGER NOT NULL,
  boot TEXT NOT NULL,
  op TEXT NOT NULL,
  said TEXT NOT NULL,
  version INTEGER NOT NULL,
  hash TEXT NOT NULL,
  UNIQUE (session, id),                                    -- prevents two tasks of one id
  CHECK (until = 0 OR state = 'assigned' OR state = 'active'));
CREATE INDEX ready_tasks ON tasks (session, lane, priority DESC, num)
  WHERE state = 'pending' AND open = 0 AND due = 0;
CREATE INDEX due_tasks ON tasks (session, due) WHERE state = 'pending' AND due > 0;
CREATE INDEX leased_tasks ON tasks (session, num) WHERE until > 0;
CREATE INDEX claimed_tasks ON tasks (claim) WHERE until > 0;
CREATE INDEX tasks_by_age ON tasks (session, num);
CREATE INDEX tasks_by_state ON tasks (session, state);
CREATE INDEX parts_of_tasks ON tasks (session, parent) WHERE parent <> '';
CREATE TABLE task_docs (num INTEGER PRIMARY KEY REFERENCES tasks (num), doc TEXT NOT NULL);
CREATE VIEW whole_tasks AS SELECT tasks.*, task_docs.doc FROM tasks JOIN task_docs USING (num);
CREATE TABLE task_deps (
  task INTEGER NOT NULL REFERENCES tasks (num),
  dep INTEGER NOT NULL REFERENCES tasks (num),
  on_failure TEXT NOT NULL CHECK (on_failure = 'skip' OR on_failure = 'fail' OR on_failure = 'run'),
  PRIMARY KEY (task, dep)) WITHOUT ROWID;
CREATE INDEX dependents_of_tasks ON task_deps (dep, task);
CREATE TABLE task_events (
  seq INTEGER PRIMARY KEY,
  session TEXT NOT NULL,
  task TEXT NOT NULL,
  n INTEGER NOT NULL,
  kind TEXT NOT NULL,
  from_state TEXT NOT NULL,
  to_state TEXT NOT NULL,
  actor TEXT NOT NULL,
  source TEXT NOT NULL,
  stage TEXT NOT NULL,
  at INTEGER NOT NULL,
  data TEXT NOT NULL,
  hash TEXT NOT NULL,
  UNIQUE (session, task, n));                              -- prevents two stories of one task
CREATE TRIGGER task_events_stay BEFORE UPDATE ON task_events BEGIN
  SELECT RAISE(ABORT, 'events of tasks are never changed');
END;
CREATE TRIGGER task_events_are_kept BEFORE DELETE ON task_events BEGIN
  SELECT RAISE(ABORT, 'events of tasks are never deleted');
END;
-- INSERT OR REPLACE deletes without asking the trigger before
CREATE TRIGGER task_events_are_new BEFORE INSERT ON task_events
WHEN EXISTS (SELECT 1 FROM task_events WHERE seq = NEW.seq)
  OR EXISTS (SELECT 1 FROM task_events WHERE session = NEW.session AND task = NEW.task AND n = NEW.n) BEGIN
  SELECT RAISE(ABORT, 'events of tasks are never replaced');
END;
CREATE TABLE task_sessions (session TEXT PRIMARY KEY, about TEXT NOT NULL DEFAULT '{}') WITHOUT ROWID;
CREATE TABLE task_workers (
  id TEXT PRIMARY KEY,
  session TEXT NOT NULL,
  started INTEGER NOT NULL,
  seen INTEGER NOT NULL,
  about TEXT NOT NULL) WITHOUT ROWID;
CREATE INDEX workers_by_age ON task_workers (session, started);
CREATE TABLE task_deliveries (
  num INTEGER PRIMARY KEY,
  session TEXT NOT NULL,
  recipient TEXT NOT NULL,
  channel TEXT NOT NULL,
  key TEXT NOT NULL,
  outcome TEXT NOT NULL,
  why TEXT NOT NULL,
  call TEXT NOT NULL,
  at INTEGER NOT NULL,
  until INTEGER NOT NULL);
CREATE INDEX deliveries_by_key ON task_deliveries (session, channel, recipient, key);
CREATE INDEX deliveries_by_time ON task_deliveries (session, recipient, channel, at) WHERE outcome = 'sent';
CREATE INDEX open_deliveries ON task_deliveries (session, recipient, channel) WHERE until > 0;
