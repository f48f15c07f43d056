-- The ledger in one Redis namespace. Each operation is one run of this script: nothing comes between
-- its reading and its writing, so policy is judged where the next run is inserted. An operation writes
-- nothing before it has decided; what Redis may refuse (no memory, a replica, a disk that is full) it
-- refuses at the first write, so an operation that fails has changed nothing. Where memory is full, a
-- first write that frees some lets the rest pass: claims begin with one that does not, ends and renewals
-- of a run that goes on and resets with one that does.
--
-- KEYS[1]  {ns}:meta. All keys share the hash tag {ns}, so that a cluster keeps them on one node
-- ARGV     name of the operation, id of the ledger that the caller opened, then what the operation takes
--
-- Keys, each after the prefix {ns}:
--
--   meta              hash: schema, id (random, made with the ledger), seq (newest event), checked; of a move:
--                       move (how the ledger stands in it), closed ("all" or "new", a space, and what who is
--                       refused is told), placed (calls that came by it)
--   call:<call>       hash, all that is known of one call:
--                       head              "latest first won counted": the number of its newest run (1 to
--                                         latest are all there, but for what was pruned before a move); the
--                                         number of the event of its first claim, its place in the lists; the
--                                         newest run that had its effect (success or late success); "run:time …"
--                                         of the successes that are not released
--                       owner:<token>     the run of that claim, where it is not the newest
--                       waited            there if somebody waits for its newest run to end
--                       <run>:row         JSON object of strings: tool wf caller owner started lease
--                                         status ended closed_by released forced late late_at
--                       <run>:<text>      key args matched result error trace, byte for byte as they came
--                       <run>:blocked     attempts that ran nothing
--   calls             zset of calls by `first`;  calls:<wf>  those of one workflow
--   running:<tool>    zset of the calls whose newest run is open, by lease
--   failed:<tool>     zset of the calls whose newest run ended so, by `first`; also suspended:<tool> and
--                     doubt:<tool> (not released, no late success)
--   totals            hash "<sum> <tool>": actions claims executed blocked
--   tally:<call>      hash, an unlimited tool's call: tool wf caller args ran raised error created touched
--   tallies           zset of these calls by their first event;  tallies:<wf>, raised:<tool> likewise
--   events            stream, id <seq>-0: call run kind at tool wf caller n detail
--   processes         hash: process → JSON [host, pid, boot, space, start]
--   batch:<writer>    number of its newest batch of counts; gone a day later, when nobody sends that again
--
-- Channel {ns}:ended carries the calls that were `waited` for when they end.
--
-- Times are UTC microseconds of this server, as text: a double holds them, cjson would round them.

-- Sections stand in the order of how often they are asked for, and each answers before the next begins:
-- a script builds its functions anew each time, and what stands below is never built for what stands above.

local operation, meta = ARGV[1], KEYS[1]
local prefix = string.sub(meta, 1, -5)

-- a server that came back empty must not look like a ledger in which nothing was ever done
local id, closed = unpack(redis.call('HMGET', meta, 'id', 'closed'))
if operation ~= 'open' and id ~= ARGV[2] then
  return 'replaced'
end

-- a ledger that is closed for a move: what it refuses is decided where a run would start, or before a change
local function no_entry()
  return {'closed', string.sub(closed, 5)}
end

local writing = ' claim settle renew count release resolve reset reset_scope '
if closed and string.sub(closed, 1, 3) == 'all' and string.find(writing, ' ' .. operation .. ' ', 1, true) then
  return no_entry()
end

-- ── looking at one call ───────────────────────────────────────────────────────────────

local call, key, latest, first, won, counted    -- the last four: see `head` above
local older                                     -- the run of the claim in question, if it is not the newest
local waited                                    -- whether somebody is to be told of its end
local first_row                                 -- the row of run 1, not read yet: mostly it is what is asked for

local function open(name, token)
  call, key = name, prefix .. 'call:' .. name
  local found = redis.call('HMGET', key, 'head', 'owner:' .. (token or ''), 'waited', '1:row')
  older, waited, first_row = tonumber(found[2] or ''), found[3], found[4]
  if found[1] then
    latest, first, won, counted = string.match(found[1], '^(%d+) (%d+) (%d+) (.*)$')
    latest, won = tonumber(latest), tonumber(won)
  else
    latest, first, won, counted = 0, nil, 0, ''
  end
end

local function read(run)
  local found = run == 1 and first_row
  if found then
    first_row = nil                             -- it may be changed from here on
  else
    found = redis.call('HGET', key, run .. ':row')
  end
  return found and cjson.decode(found)
end

-- a run as a caller is told of it: its number and the lengths of its row and texts (-1: there is none) on a
-- line, then these one after the other. One string, because it is many replies to read otherwise
local function shown(run)
  local at = run .. ':'
  local found = redis.call('HMGET', key, at .. 'row', at .. 'key', at .. 'args', at .. 'matched',
    at .. 'result', at .. 'error', at .. 'trace', at .. 'blocked')
  local sizes = {run}
  for i = 1, 8 do
    sizes[i + 1] = found[i] and #found[i] or -1
    found[i] = found[i] or ''
  end
  return table.concat(sizes, ' ') .. '\n' .. table.concat(found)
end

-- the verdict: its kind and the first run of the intended effect on a line, then the run that it is about
local function told(kind, run, anchor)
  return kind .. ' ' .. (anchor or 1) .. '\n' .. (run and shown(run) or '')
end

-- most duplicates: a success that nothing can undo, and no more than one asked for at any time
local function is_plain_duplicate(name, token, tool, wf, caller, max, ttl, lease, on_doubt, forced)
  open(name, token)
  if max ~= '1' or ttl ~= '' or forced ~= '0' or older or latest == 0 then return false end
  local last = read(latest)
  return last.status == 'success' and not last.released and last.owner ~= token
end

if operation == 'claim' and is_plain_duplicate(unpack(ARGV, 3, 12)) then return told('done', latest) end

-- ── time, and what an operation writes ────────────────────────────────────────────────

local function server_time()
  local t = redis.call('TIME')
  return t[1] * 1000000 + t[2]
end

local function as_text(number)
  return string.format('%.0f', number)
end

local now = server_time()
local at_now = as_text(now)

-- what an operation returns; an error of the server keeps its code, which Redis 6 would bury in a text
local function answer(perform)
  local ok, reply = pcall(perform, unpack(ARGV, 3, math.min(#ARGV, 100)))    -- unpack has a limit
  if ok then return reply end
  local told = type(reply) == 'table' and reply.err or reply
  return redis.error_reply(string.match(told, '^@user_script: %d+: %-(.+)$') or told)
end

local pending = {}                              -- fields and values of the call that wait for one HSET

local function set(field, value)
  pending[#pending + 1] = field
  pending[#pending + 1] = value
  if #pending > 1000 then                       -- unpack has a limit
    redis.call('HSET', key, unpack(pending))
    pending = {}
  end
end

local function write()
  if #pending > 0 then
    redis.call('HSET', key, unpack(pending))
    pending = {}
  end
end

local function set_head()
  set('head', latest .. ' ' .. first .. ' ' .. won .. ' ' .. counted)
end

local function lives(row)
  return row.status == 'running' and tonumber(row.lease) > now
end

local function had_effect(row)
  return row.status == 'success' or row.late == 'success'
end

-- since when this row counts as a success, nil if it does not
local function counts_since(row)
  if row.released then return nil end
  return row.status == 'success' and row.ended or row.late == 'success' and row.late_at or nil
end

-- the zset that the call stands in while this is its newest run
local function end_of(row)
  if row.status == 'success' then return nil end
  if row.status == 'doubt' and (row.released or row.late == 'success') then return nil end
  return prefix .. row.status .. ':' .. row.tool
end

local function stand(was, row)
  local is = end_of(row)
  if was and was ~= is then
    redis.call('ZREM', was, call)
  end
  if is and row.status == 'running' then
    redis.call('ZADD', is, row.lease, call)
  elseif is and was ~= is then
    redis.call('ZADD', is, first, call)
  end
end

local function add(sum, tool, n)
  redis.call('HINCRBY', prefix .. 'totals', sum .. ' ' .. tool, n)
end

-- the number of the next event, without a gap
local function next_seq()
  return as_text(redis.call('HINCRBY', meta, 'seq', '1'))
end

-- one event; n counts towards the totals
local function note(kind, run, row, n, detail, seq)
  seq = seq or next_seq()
  local event = {
    'call', call, 'run', run, 'kind', kind, 'at', at_now, 'tool', row.tool, 'wf', row.wf,
    'caller', row.caller, 'n', n,
  }
  if detail then
    event[17], event[18] = 'detail', detail
  end
  redis.call('XADD', prefix .. 'events', seq .. '-0', unpack(event))
  return seq
end

-- the runs of `counted` that are younger than ttl ('': all), oldest first
local function successes(ttl)
  local found = {}
  local horizon = ttl == '' and -1 or now - tonumber(ttl)
  for run, time in string.gmatch(counted, '(%d+):(%d+)') do
    if tonumber(time) > horizon then
      found[#found + 1] = tonumber(run)
    end
  end
  return found
end

local function recount(changed, since)
  local kept = {}
  for run, time in string.gmatch(counted, '(%d+):(%d+)') do
    if tonumber(run) < changed then
      kept[#kept + 1] = run .. ':' .. time
    end
  end
  if since then
    kept[#kept + 1] = changed .. ':' .. since
  end
  for run, time in string.gmatch(counted, '(%d+):(%d+)') do
    if tonumber(run) > changed then
      kept[#kept + 1] = run .. ':' .. time
    end
  end
  counted = table.concat(kept, ' ')
end

-- change a row and all that is derived from it; false takes a value away
local function move(run, row, change, detail)
  local was, stood, won_before, counted_before = row.status, end_of(row), had_effect(row), counts_since(row)
  if was == 'running' then
    redis.call('ZREM', stood, call)             -- before all else: see above
    stood = nil
  end
  for name, value in pairs(change) do
    row[name] = value or nil
  end
  set(run .. ':row', cjson.encode(row))
  local wins, recounts = had_effect(row) and not won_before, counts_since(row) ~= counted_before
  if wins then
    won = math.max(won, run)
    add('executed', row.tool, '1')
  end
  if recounts then recount(run, counts_since(row)) end
  if wins or recounts then set_head() end
  write()
  if run == latest then
    stand(stood, row)
  end
  if was == 'running' and row.status ~= 'running' then
    note(row.status, run, row, '1', detail)
  end
end

-- tell those who wait for this call, if anybody does; last of all, and who may not publish has settled too
local function wake()
  if waited then
    redis.call('HDEL', key, 'waited')
    redis.pcall('PUBLISH', prefix .. 'ended', call)
  end
end

-- to the owner of a run; it knows the rest of its row. `closed` is the run that it took over
local function granted(run, row, anchor, closed)
  return 'granted ' .. anchor .. ' ' .. run .. ' ' .. row.started .. '\n' .. (closed or '')
end

-- whether a parameter named in match= is not what it was
local function mismatch(theirs, ours)
  if not (theirs and ours) or theirs == ours then return false end
  local old, new = cjson.decode(theirs), cjson.decode(ours)
  for name, digest in pairs(new) do
    if old[name] ~= nil and old[name] ~= digest then return true end
  end
  return false
end

local function set_texts(run, given)
  for i = 1, #given, 2 do
    set(run .. ':' .. given[i], given[i + 1])
  end
end

local function given_as(name, given)
  for i = 1, #given, 2 do
    if given[i] == name then return given[i + 1] end
  end
  return nil
end

-- ── claim ─────────────────────────────────────────────────────────────────────────────

-- why no run may start: the kind of the refusal and the run that it is about
local function refusal(last, max, ttl, on_doubt, answered, matched)
  local found = successes(ttl)
  if #found >= tonumber(max) then
    return 'done', found[#found]
  end
  if (last.status == 'running' or last.status == 'doubt') and not last.released then
    if matched and mismatch(redis.call('HGET', key, latest .. ':matched'), matched) then
      return 'conflict', latest
    end
    if on_doubt ~= 'rerun' and not answered then
      return on_doubt == 'reconcile' and 'reconcile' or 'doubt', latest
    end
  end
  return nil
end

-- the same claim again: the reply to it was lost
local function repeated(run, row, lease)
  if row.status ~= 'running' then return told('lost', run, won + 1) end
  move(run, row, {lease = lease})
  return granted(run, row, won + 1)
end

-- takeover: close what is still open, and answer or pass over a doubt; true if it was closed as in doubt
local function close(last, token, answered, forced)
  answered = answered and not last.released
  if last.status == 'running' then
    local release = not answered and forced and '1' or last.released
    move(latest, last, {status = answered and 'failed' or 'doubt', ended = at_now, closed_by = token,
      released = release})
    return not answered
  end
  if last.status == 'doubt' and answered then
    move(latest, last, {status = 'failed', ended = at_now, closed_by = token})
    note('resolved', latest, last, 0, 'reconcile: not done')
  elseif last.status == 'doubt' and forced then
    move(latest, last, {released = '1'})
  end
  return false
end

-- put down the row of the next run, before all that goes with it; false if there is one. That of run 1 waits for
-- the rest of its call: there the number of its event is what is written, or refused, first
local function begin(run, row)
  local text = cjson.encode(row)
  if run > 1 then return redis.call('HSETNX', key, run .. ':row', text) == 1 end
  set('1:row', text)
  return not first_row
end

local function insert(run, row, given)
  local seq, is_new = next_seq(), not first
  first = first or seq
  set_texts(run, given)
  set_head()
  write()
  note('claimed', run, row, '1', nil, seq)
  if is_new then
    redis.call('ZADD', prefix .. 'calls', first, call)
    redis.call('ZADD', prefix .. 'calls:' .. row.wf, first, call)
    add('actions', row.tool, '1')
  end
  add('claims', row.tool, '1')
end

local function claim(name, token, tool, wf, caller, max, ttl, lease, on_doubt, forced, seen_run, seen_owner,
                     ...)
  local given = {...}
  local last = latest > 0 and read(latest)      -- the call is open already
  lease = as_text(now + lease)
  if older then return repeated(older, read(older), lease) end
  if last and last.owner == token then return repeated(latest, last, lease) end
  if last and lives(last) then return told('live', latest) end
  local answered = last and tonumber(seen_run) == latest and last.owner == seen_owner
  if last and forced == '0' then
    local kind, run = refusal(last, max, ttl, on_doubt, answered, given_as('matched', given))
    if kind then return told(kind, run) end
  end
  if closed then return no_entry() end
  local run, anchor = latest + 1, won + 1
  local row = {tool = tool, wf = wf, caller = caller, owner = token, started = at_now, lease = lease,
    status = 'running', forced = forced == '1' and '1' or nil}
  if not begin(run, row) then
    return redis.error_reply('LEDGER run ' .. run .. ' of call ' .. call .. ' is there although the newest'
      .. ' is ' .. latest .. ': its key was changed by somebody else')
  end
  local stood, closed
  if last then
    closed = close(last, token, answered, forced == '1') and shown(latest)
    stood = end_of(last)
    set('owner:' .. last.owner, latest)
  end
  latest = run
  insert(run, row, given)
  stand(stood, row)
  return granted(run, row, anchor, closed)
end

if operation == 'claim' then return answer(claim) end

-- ── settle, renew ─────────────────────────────────────────────────────────────────────

-- the end of a run that had been given up: kept beside its status, once
local function late(run, row, ending, result, err)
  local takes = row.status == 'doubt' and (ending == 'success' or ending == 'failed')
    or row.status == 'failed' and ending == 'success'
  if row.late or not takes then return end
  local told = redis.call('HMGET', key, run .. ':result', run .. ':error')
  if ending == 'success' and not told[1] and result then
    set(run .. ':result', result)
  end
  if err and (not told[2] or told[2] == '') then
    set(run .. ':error', err)
  elseif told[2] == '' then
    redis.call('HDEL', key, run .. ':error')
  end
  move(run, row, {late = ending, late_at = at_now})
  note('late', run, row, ending == 'success' and 1 or 0, ending)
end

local function settle(name, token, ending, ...)
  local given = {...}
  open(name, token)
  local run = older or latest
  local row = run > 0 and read(run)
  if not row or row.owner ~= token then return told('gone') end
  if row.closed_by == token then                -- the reply to my own settle was lost
    return told('settled', run)
  end
  local err = given_as('error', given)
  if row.status ~= 'running' then
    late(run, row, ending, given_as('result', given), err)
    wake()
    return told('late', run)
  end
  set_texts(run, given)
  move(run, row, {status = ending, ended = at_now, closed_by = token}, err)
  wake()
  return told('settled')
end

local function renew(name, token, run, lease)
  open(name)
  local row = latest == tonumber(run) and read(latest)      -- an older run is not open
  if not row or row.owner ~= token or row.status ~= 'running' then return told('lost') end
  move(latest, row, {lease = as_text(now + lease)})
  return told('renewed')
end

if operation == 'settle' then return answer(settle) end
if operation == 'renew' then return answer(renew) end

-- ── counting ──────────────────────────────────────────────────────────────────────────

local function count_tally(tool, wf, caller, args, err, kind, times, run)
  local tally = prefix .. 'tally:' .. call
  local is_new = redis.call('EXISTS', tally) == 0
  local seq = note(kind, run, {tool = tool, wf = wf, caller = caller}, times, err)
  if is_new then
    redis.call('HSET', tally, 'tool', tool, 'wf', wf, 'caller', caller, 'ran', 0, 'raised', 0,
      'first', seq, 'created', at_now)
    if args then redis.call('HSET', tally, 'args', args) end
    redis.call('ZADD', prefix .. 'tallies', seq, call)
    redis.call('ZADD', prefix .. 'tallies:' .. wf, seq, call)
    add('actions', tool, 1)
  end
  redis.call('HINCRBY', tally, kind, times)
  redis.call('HSET', tally, 'touched', at_now)
  if err then
    redis.call('HSET', tally, 'error', err)
    redis.call('ZADD', prefix .. 'raised:' .. tool, redis.call('HGET', tally, 'first'), call)
  else
    redis.call('HDEL', tally, 'error')
    redis.call('ZREM', prefix .. 'raised:' .. tool, call)
  end
  add('claims', tool, times)
  if kind == 'ran' then add('executed', tool, times) end
end

-- one batch of a writer, once however often it is sent: call run kind tool wf caller args error n, …
local function count()
  local written, batch = prefix .. 'batch:' .. ARGV[3], ARGV[4]    -- the items are too many for parameters
  if tonumber(redis.call('GET', written) or 0) >= tonumber(batch) then
    return told('counted')
  end
  redis.call('SET', written, batch, 'EX', 86400)
  for i = 5, #ARGV, 9 do
    local run, kind, tool, wf, caller = ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4], ARGV[i + 5]
    local args, err, times = ARGV[i + 6], ARGV[i + 7], ARGV[i + 8]
    args, err = args ~= '' and args or nil, err ~= '' and err or nil
    call, key = ARGV[i], prefix .. 'call:' .. ARGV[i]
    if kind ~= 'blocked' then
      count_tally(tool, wf, caller, args, err, kind, times, run)
    elseif redis.call('HEXISTS', key, run .. ':row') == 1 then   -- else it was reset meanwhile
      redis.call('HINCRBY', key, run .. ':blocked', times)
      add('blocked', tool, times)
      note(kind, run, {tool = tool, wf = wf, caller = caller}, times, err)
    end
  end
  return told('counted')
end

if operation == 'count' then return answer(count) end

-- ── release, resolve, reset ───────────────────────────────────────────────────────────

-- the newest run if it is the one that the caller saw and it is not alive; else the refusal
local function seen(name, run, owner)
  open(name)
  if latest == 0 then return nil, told('nothing') end
  local last = read(latest)
  if latest ~= tonumber(run) or last.owner ~= owner then return nil, told('used', latest) end
  if lives(last) then return nil, told('live', latest) end
  return last
end

if closed and (operation == 'release' or operation == 'resolve' or operation == 'reset') then return no_entry() end

local function release(name, token, seen_run, seen_owner, max, ttl, why)
  local last, refused = seen(name, seen_run, seen_owner)
  if not last then return refused end
  local before = {}
  for _, run in ipairs(successes(ttl)) do
    if run < latest then
      before[#before + 1] = run
    end
  end
  if last.status == 'running' then
    move(latest, last, {status = 'doubt', ended = at_now, closed_by = token, released = '1'})
  else
    move(latest, last, {released = '1'})
  end
  for i = tonumber(max), #before do             -- after a forced run that failed, these still block
    move(before[i], read(before[i]), {released = '1'})
  end
  note('released', latest, last, 0, why)
  return told('released', latest)
end

local function resolve(name, token, seen_run, seen_owner, done, reconciled, why, result)
  local last, refused = seen(name, seen_run, seen_owner)
  if not last then return refused end
  local was, late_before = last.status, last.late
  if was ~= 'running' and was ~= 'doubt' or reconciled == '1' and last.released then
    return told('settled', latest)
  end
  done = done == '1'
  if done and result then
    set(latest .. ':result', result)
  end
  move(latest, last, {status = done and 'success' or 'failed', ended = at_now, closed_by = token,
    released = false})
  if done and not result then
    redis.call('HDEL', key, latest .. ':result')
  end
  note('resolved', latest, last, done and was == 'doubt' and late_before ~= 'success' and 1 or 0, why)
  wake()
  return told('resolved', latest)
end

-- delete the call that is open, and take it out of the lists and the totals
local function forget()
  local wf
  redis.call('ZREM', prefix .. 'calls', call)
  for run = 1, latest do
    local row = read(run)
    if row then
      add('claims', row.tool, -1)
      add('executed', row.tool, had_effect(row) and -1 or 0)
      add('blocked', row.tool, 0 - (redis.call('HGET', key, run .. ':blocked') or 0))
      if not wf then add('actions', row.tool, -1) end
      if run == latest and end_of(row) then redis.call('ZREM', end_of(row), call) end
      wf = row.wf
    end
  end
  redis.call('ZREM', prefix .. 'calls:' .. wf, call)
  redis.call('UNLINK', key)
end

local function reset(name, asked)
  open(name)
  if latest == 0 then return told('nothing') end
  local last = read(latest)
  if lives(last) then return told('live', latest) end
  if tonumber(last.started) > tonumber(asked) then return told('used', latest) end
  forget()
  note('reset', latest, last, 0)
  return told('reset')
end

if operation == 'release' then return answer(release) end
if operation == 'resolve' then return answer(resolve) end
if operation == 'reset' then return answer(reset) end

local function forget_tally(name)
  local tally = prefix .. 'tally:' .. name
  local found = redis.call('HMGET', tally, 'tool', 'wf', 'ran', 'raised')
  add('actions', found[1], -1)
  add('claims', found[1], 0 - found[3] - found[4])
  add('executed', found[1], 0 - found[3])
  redis.call('ZREM', prefix .. 'tallies', name)
  redis.call('ZREM', prefix .. 'tallies:' .. found[2], name)
  redis.call('ZREM', prefix .. 'raised:' .. found[1], name)
  redis.call('UNLINK', tally)
end

local function tools()
  local found = {}
  for _, field in ipairs(redis.call('HKEYS', prefix .. 'totals')) do
    if string.sub(field, 1, 8) == 'actions ' then
      found[#found + 1] = string.sub(field, 9)
    end
  end
  return found
end

-- a call with a live run in that list of calls
local function live_in(list)
  for _, tool in ipairs(tools()) do
    local alive = redis.call('ZRANGEBYSCORE', prefix .. 'running:' .. tool, '(' .. at_now, '+inf')
    for _, name in ipairs(alive) do
      if redis.call('ZSCORE', list, name) then return name end
    end
  end
  return nil
end

local function note_reset(scope, wf, detail)
  local event = {'kind', 'reset', 'at', at_now, 'n', 0}
  if scope == 'wf' then
    event[7], event[8] = 'wf', wf
  end
  if detail ~= '' then
    event[#event + 1] = 'detail'
    event[#event + 1] = detail
  end
  redis.call('XADD', prefix .. 'events', next_seq() .. '-0', unpack(event))
end

-- forget up to `limit` calls of a list from a place on; the first step refuses while one of all lives
local function reset_scope(scope, wf, asked, after, limit, forced, detail)
  local suffix = scope == 'all' and '' or ':' .. wf
  local calls, tallies = prefix .. 'calls' .. suffix, prefix .. 'tallies' .. suffix
  if closed then return no_entry() end
  if after == '0' then
    local alive = forced == '0' and live_in(calls)
    if alive then
      open(alive)
      return {'live', alive, shown(latest)}
    end
  end
  local page = redis.call('ZRANGEBYSCORE', calls, '(' .. after, '+inf', 'WITHSCORES', 'LIMIT', 0, limit)
  for i = 1, #page, 2 do
    open(page[i])
    local last = read(latest)
    if (forced == '1' or not lives(last)) and tonumber(last.started) <= tonumber(asked) then
      forget()
    end
  end
  if after == '0' then note_reset(scope, wf, detail) end
  if #page > 0 then return {'more', page[#page]} end
  page = redis.call('ZRANGE', tallies, 0, limit - 1)
  for _, name in ipairs(page) do
    forget_tally(name)
  end
  if #page > 0 then return {'more', after == '0' and '1' or after} end
  return {'reset'}
end

if operation == 'reset_scope' then return answer(reset_scope) end

-- ── looking ───────────────────────────────────────────────────────────────────────────

if operation == 'now' then
  return at_now
end

-- those of these calls that have no live run; whoever ends one of the others tells on the channel. A server
-- that takes no write now (its memory is full) lets them be looked at all the same
local function ended()
  local found = {}
  for i = 3, #ARGV do
    open(ARGV[i])
    local last = latest > 0 and read(latest)
    if not last or not lives(last) then
      found[#found + 1] = call
    elseif not waited then
      redis.pcall('HSET', key, 'waited', 1)
    end
  end
  return found
end

-- tool, actions, claims, executed, blocked, failed, in doubt, suspended, running, …
local function totals()
  local found = {}
  for _, tool in ipairs(tools()) do
    local sums = redis.call('HMGET', prefix .. 'totals', 'actions ' .. tool, 'claims ' .. tool,
      'executed ' .. tool, 'blocked ' .. tool)
    local running = prefix .. 'running:' .. tool
    local lapsed = redis.call('ZCOUNT', running, '-inf', at_now)
    found[#found + 1] = {tool, sums[1], sums[2] or 0, sums[3] or 0, sums[4] or 0,
      redis.call('ZCARD', prefix .. 'failed:' .. tool),
      redis.call('ZCARD', prefix .. 'doubt:' .. tool) + lapsed,
      redis.call('ZCARD', prefix .. 'suspended:' .. tool),
      redis.call('ZCARD', running) - lapsed}
  end
  return found
end

-- tool, error of its newest call that failed, …
local function last_errors()
  local found = {}
  for _, tool in ipairs(tools()) do
    local raised = redis.call('ZREVRANGE', prefix .. 'raised:' .. tool, 0, 0)[1]
    local failed = redis.call('ZREVRANGE', prefix .. 'failed:' .. tool, 0, 0)[1]
    if raised then
      found[#found + 1] = {tool, redis.call('HGET', prefix .. 'tally:' .. raised, 'error')}
    elseif failed then
      open(failed)
      found[#found + 1] = {tool, redis.call('HGET', key, latest .. ':error')}
    end
  end
  return found
end

local function check()
  redis.call('HSET', meta, 'checked', at_now)
  return 'checked'
end

if operation == 'ended' then return answer(ended) end
if operation == 'totals' then return answer(totals) end
if operation == 'last_errors' then return answer(last_errors) end
if operation == 'check' then return answer(check) end

-- ── opening ───────────────────────────────────────────────────────────────────────────

-- make the ledger if there is none, and say who comes: {schema, id}
local function open_ledger(schema, id, process, about)
  if redis.call('HSETNX', meta, 'schema', schema) == 1 then
    redis.call('HSET', meta, 'id', id, 'seq', 0)
  end
  local found = redis.call('HMGET', meta, 'schema', 'id')
  if tonumber(found[1]) <= tonumber(schema) then
    redis.call('HSETNX', prefix .. 'processes', process, about)
  end
  return found
end

if operation == 'open' then return answer(open_ledger) end

-- ── moving a ledger ───────────────────────────────────────────────────────────────────
-- The items are too many for parameters; they are read one after the other. A value that may be absent is
-- '' then, else it follows a '='.

local at = 0

local function take()
  at = at + 1
  return ARGV[at]
end

local function take_value()
  local value = take()
  return value ~= '' and string.sub(value, 2) or nil
end

local function next_place()
  return as_text(redis.call('HINCRBY', meta, 'placed', 1))
end

-- the call that is open, as it is on the other side: number, row, six texts and the count of each run
local function receive_runs(runs)
  local place = first or runs > 0 and next_place()
  if latest > 0 then forget() end
  latest, won, counted, first = 0, 0, '', place
  local last
  for i = 1, runs do
    local run, text = tonumber(take()), take()
    local row = cjson.decode(text)
    set(run .. ':row', text)
    for _, name in ipairs({'key', 'args', 'matched', 'result', 'error', 'trace'}) do
      local value = take_value()
      if value then set(run .. ':' .. name, value) end
    end
    local blocked = take()
    if blocked ~= '0' then set(run .. ':blocked', blocked) end
    if last then set('owner:' .. last.owner, latest) end
    latest, last = run, row
    if had_effect(row) then won = run end
    recount(run, counts_since(row))
    if i == 1 then add('actions', row.tool, 1) end
    add('claims', row.tool, 1)
    add('executed', row.tool, had_effect(row) and 1 or 0)
    add('blocked', row.tool, blocked)
  end
  if not last then return end
  set_head()
  write()
  redis.call('ZADD', prefix .. 'calls', first, call)
  redis.call('ZADD', prefix .. 'calls:' .. last.wf, first, call)
  stand(nil, last)
end

-- tool wf caller args ran raised error created touched
local function receive_tally(name, there)
  local tally = prefix .. 'tally:' .. name
  local place = redis.call('HGET', tally, 'first')
  if place then forget_tally(name) end
  if there == '0' then return end
  place = place or next_place()
  local value = {}
  for _, field in ipairs({'tool', 'wf', 'caller', 'args', 'ran', 'raised', 'error', 'created', 'touched'}) do
    value[field] = take_value()
    if value[field] then redis.call('HSET', tally, field, value[field]) end
  end
  redis.call('HSET', tally, 'first', place)
  redis.call('ZADD', prefix .. 'tallies', place, name)
  redis.call('ZADD', prefix .. 'tallies:' .. value.wf, place, name)
  if value.error then redis.call('ZADD', prefix .. 'raised:' .. value.tool, place, name) end
  add('actions', value.tool, 1)
  add('claims', value.tool, value.ran + value.raised)
  add('executed', value.tool, value.ran)
end

local function receive_event()
  local event = {}
  for _, field in ipairs({'call', 'run', 'kind', 'at', 'tool', 'wf', 'caller', 'n', 'detail'}) do
    local value = take_value()
    if value then
      event[#event + 1] = field
      event[#event + 1] = value
    end
  end
  redis.call('XADD', prefix .. 'events', next_seq() .. '-0', unpack(event))
end

local function is_empty()
  for _, list in ipairs({'calls', 'tallies', 'events'}) do
    if redis.call('EXISTS', prefix .. list) == 1 then return false end
  end
  return true
end

-- one step of a move: mark before, mark after, what it closes, whether all goes or nothing may be there, then
-- counts of calls, processes and events with these
local function step()
  at = 2
  local was, now, closes, how = take(), take(), take(), take()
  local found = redis.call('HGET', meta, 'move') or ''
  if found ~= was then return {'found', found} end
  if how == 'first' and not is_empty() then return {'full'} end
  local calls, processes, events = take(), take(), take()
  redis.call('HSET', meta, 'move', now)         -- before all else: what may be refused is refused here
  if now == '' then redis.call('HDEL', meta, 'move') end
  if how == 'erase' then
    redis.call('UNLINK', prefix .. 'events', prefix .. 'totals')
    redis.call('HSET', meta, 'seq', 0)
    redis.call('HDEL', meta, 'placed')
  end
  for _ = 1, calls do
    local name, runs, tally = take(), tonumber(take()), take()
    open(name)
    receive_runs(runs)
    receive_tally(name, tally)
  end
  for _ = 1, processes do
    redis.call('HSETNX', prefix .. 'processes', take(), take())
  end
  for _ = 1, events do
    receive_event()
  end
  local seq, placed = unpack(redis.call('HMGET', meta, 'seq', 'placed'))
  if closes ~= '' then
    redis.call('HSET', meta, 'closed', closes)
  else
    redis.call('HDEL', meta, 'closed')
    if placed and tonumber(placed) > tonumber(seq) then    -- a place is the number of an event from now on
      redis.call('HSET', meta, 'seq', placed)
    end
  end
  return {'stepped'}
end

if operation == 'step' then return answer(step) end
return redis.error_reply('LEDGER there is no operation ' .. operation)
