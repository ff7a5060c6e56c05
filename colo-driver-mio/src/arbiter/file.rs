//! The register as a file on storage that both hosts see, under a lock.
//!
//! The lock orders the hosts (`flock`, which NFS since version 4 and cluster file systems carry
//! between hosts); the register is replaced as a whole and synced before the answer. Everything
//! happens on a thread of its own: storage that hangs makes the arbiter unreachable and leaves the
//! loop alone.
//!
//! What the storage must do: carry advisory locks between the hosts, make a synced rename visible
//! to whoever takes the lock next, and let go of a dead host's lock.

use core::time::Duration;
use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io,
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, Sender, channel},
    thread,
};

use colo_proto::{
    member::{Ballot, RecordError, Register, RequestId, Verdict},
    time::Instant,
};
use rustix::fs::{FlockOperation, flock};

use super::Arbiter;
use crate::{
    Wake,
    record::{beside, sync_name, write_durably},
};

/// An arbiter in a file.
#[derive(Debug)]
pub struct FileArbiter {
    path: PathBuf,
    patience: Duration,
    questions: Option<Sender<(RequestId, Question)>>,
    answers: Option<Receiver<(RequestId, Verdict)>>,
    /// Questions with the thread, and when they count as unanswered; `None` when they already do.
    open: BTreeMap<RequestId, Option<Instant>>,
}

#[derive(Clone, Copy, Debug)]
enum Question {
    Cast(Ballot),
    Read(RequestId),
}

/// Failures in a row: of those that repeat every second, few are worth a line.
#[derive(Debug, Default)]
struct Trouble {
    times: u64,
}

/// What is worth a line, and after how many failures.
#[derive(Debug, PartialEq, Eq)]
enum Said {
    Begins,
    Lasts(u64),
    Over(u64),
}

impl Trouble {
    /// What to say after one more question: the first failure, then each at twice the distance, and
    /// the end.
    fn after(&mut self, answered: bool) -> Option<Said> {
        if answered {
            let times = std::mem::take(&mut self.times);
            return (times > 0).then_some(Said::Over(times));
        }
        self.times += 1;
        match self.times {
            1 => Some(Said::Begins),
            // Two in a row are no news yet.
            times if times >= 8 && times.is_power_of_two() => Some(Said::Lasts(times)),
            _ => None,
        }
    }
}

/// Why the register could not be asked.
#[derive(Debug, thiserror::Error)]
enum AskError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("the register is damaged: {0}")]
    Damaged(#[from] RecordError),
}

impl FileArbiter {
    /// An arbiter in the file at `path`, which is made at the first grant. A question counts as
    /// unanswered after `patience`, and is answered all the same if it is repeated.
    #[must_use]
    pub const fn new(path: PathBuf, patience: Duration) -> Self {
        Self {
            path,
            patience,
            questions: None,
            answers: None,
            open: BTreeMap::new(),
        }
    }

    fn ask(&mut self, now: Instant, request: RequestId, question: Question) {
        let until = Some(now + self.patience);
        // A repeated question that still hangs waits for the same answer: nothing piles up.
        if self.open.insert(request, until).is_none()
            && let Some(questions) = &self.questions
            && questions.send((request, question)).is_err()
        {
            tracing::error!("the arbiter's thread is gone; it counts as unreachable");
        }
    }
}

impl Arbiter for FileArbiter {
    fn attach(&mut self, wake: Wake) -> io::Result<()> {
        let (questions, inbox) = channel();
        let (outbox, answers) = channel();
        let path = self.path.clone();
        thread::Builder::new()
            .name("colo-arbiter".to_owned())
            .spawn(move || {
                let mut trouble = Trouble::default();
                while let Ok((request, question)) = inbox.recv() {
                    let answer = put(&path, question);
                    let path = path.display();
                    match trouble.after(answer.is_ok()) {
                        Some(Said::Begins) => {
                            if let Err(error) = &answer {
                                tracing::warn!(%path, %error, "arbiter unreachable");
                            }
                        }
                        Some(Said::Lasts(times)) => {
                            if let Err(error) = &answer {
                                tracing::warn!(%path, %error, times, "arbiter still unreachable");
                            }
                        }
                        Some(Said::Over(times)) => {
                            tracing::info!(%path, times, "the arbiter answers again");
                        }
                        None => {}
                    }
                    let verdict = answer.unwrap_or(Verdict::Unreachable);
                    if outbox.send((request, verdict)).is_err() {
                        return;
                    }
                    wake.wake();
                }
            })?;
        self.questions = Some(questions);
        self.answers = Some(answers);
        Ok(())
    }

    fn cast(&mut self, now: Instant, ballot: Ballot) {
        self.ask(now, ballot.request, Question::Cast(ballot));
    }

    fn read(&mut self, now: Instant, request: RequestId) {
        self.ask(now, request, Question::Read(request));
    }

    fn poll(&mut self, now: Instant) -> Option<(RequestId, Verdict)> {
        while let Some((request, verdict)) = self.answers.as_ref().and_then(|a| a.try_recv().ok()) {
            // A late answer to a question that was given up is not news: it will be repeated.
            if let Some(Some(_)) = self.open.remove(&request) {
                return Some((request, verdict));
            }
        }
        let (request, until) = self
            .open
            .iter_mut()
            .find(|(_, until)| until.is_some_and(|until| until <= now))?;
        *until = None;
        Some((*request, Verdict::Unreachable))
    }

    fn deadline(&self) -> Option<Instant> {
        self.open.values().filter_map(|until| *until).min()
    }
}

/// Asks the register, under the lock.
fn put(path: &Path, question: Question) -> Result<Verdict, AskError> {
    let lock = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(beside(path, "lock"))?;
    flock(&lock, FlockOperation::LockExclusive).map_err(io::Error::from)?;
    // Dropping the file lets go of the lock, after the write.
    ask(path, question, &lock)
}

fn ask(path: &Path, question: Question, _locked: &File) -> Result<Verdict, AskError> {
    let (mut register, there) = match fs::read(path) {
        Ok(bytes) => (Register::decode(&bytes)?, true),
        Err(e) if e.kind() == io::ErrorKind::NotFound => (Register::default(), false),
        Err(e) => return Err(e.into()),
    };
    // It may be there because of a write that failed in its last step: nobody is told before it is
    // durable.
    sync_name(path)?;
    let before = register;
    let verdict = match question {
        Question::Read(request) => register.read(request),
        Question::Cast(ballot) => register.cast(&ballot),
    };
    // A read makes no register: one that was lost is not to be replaced by an empty one.
    if register != before && (there || register.generation != before.generation) {
        write_durably(path, &register.encode())?;
    }
    Ok(verdict)
}

#[cfg(test)]
mod tests {
    use colo_proto::{
        id::Generation,
        member::{Mode, NodeId},
    };

    use super::*;

    fn ballot(request: u64, caller: u64, expect: u64) -> Ballot {
        Ballot {
            request: RequestId(request),
            caller: NodeId(caller),
            expect: Generation(expect),
            mode: Mode::Dual,
            owner: NodeId(caller),
            partner: NodeId(3 - caller),
            force: false,
        }
    }

    #[test]
    fn of_many_hosts_that_ask_at_once_one_wins_each_generation() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("register");
        for generation in 0..5 {
            let wins: usize = thread::scope(|scope| {
                let asked: Vec<_> = [1, 2]
                    .map(|host| {
                        let path = &path;
                        let ballot = ballot(generation * 10 + host, host, generation);
                        scope.spawn(move || put(path, Question::Cast(ballot)).unwrap())
                    })
                    .into_iter()
                    .collect();
                asked
                    .into_iter()
                    .map(|host| usize::from(matches!(host.join().unwrap(), Verdict::Granted(_))))
                    .sum()
            });
            assert_eq!(wins, 1, "generation {generation}");
        }
    }

    #[test]
    fn a_repeated_request_is_granted_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("register");
        let ask = |b| put(&path, Question::Cast(b)).unwrap();
        let first = ask(ballot(7, 1, 0));
        assert_eq!(ask(ballot(7, 1, 0)), first);
        assert!(matches!(ask(ballot(8, 2, 0)), Verdict::Denied(r) if r.request == RequestId(7)));
    }

    #[test]
    fn a_read_shows_what_the_read_before_it_left_and_makes_no_register() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("register");
        let read = |n| match put(&path, Question::Read(RequestId(n))).unwrap() {
            Verdict::Read(register) => register.mark,
            other => panic!("{other:?}"),
        };
        assert_eq!(read(1), RequestId(0));
        assert!(!path.exists());
        put(&path, Question::Cast(ballot(7, 1, 0))).unwrap();
        assert_eq!([read(2), read(3)], [RequestId(0), RequestId(2)]);
        put(&path, Question::Cast(ballot(8, 1, 1))).unwrap();
        assert_eq!(read(4), RequestId(3), "a grant keeps it");
    }

    #[test]
    fn a_lasting_failure_is_said_at_growing_distance_and_when_it_is_over() {
        let mut trouble = Trouble::default();
        assert_eq!(trouble.after(true), None);
        let said: Vec<_> = (0..40).filter_map(|_| trouble.after(false)).collect();
        let lasts = [8, 16, 32].map(Said::Lasts);
        assert_eq!(said[0], Said::Begins);
        assert_eq!(said[1..], lasts);
        assert_eq!(trouble.after(true), Some(Said::Over(40)));
        assert_eq!(trouble.after(true), None);
    }

    #[test]
    fn no_name_of_the_register_is_the_name_of_its_lock_or_its_spare() {
        for name in ["register", "register.lock", "register.spare"] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join(name);
            for generation in 0..3 {
                let asked = ballot(generation + 1, 1, generation);
                let verdict = put(&path, Question::Cast(asked)).unwrap();
                assert!(
                    matches!(verdict, Verdict::Granted(_)),
                    "{name}: {verdict:?}"
                );
            }
        }
    }

    #[test]
    fn a_damaged_register_and_a_missing_directory_are_not_answers() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("register");
        fs::write(&path, b"?").unwrap();
        let read = Question::Read(RequestId(1));
        put(&path, read).unwrap_err();
        put(&dir.path().join("not/there"), read).unwrap_err();
    }

    #[test]
    fn a_lock_that_nobody_lets_go_of_makes_it_unreachable_and_then_answers() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("register");
        let held = File::create(beside(&path, "lock")).unwrap();
        flock(&held, FlockOperation::LockExclusive).unwrap();

        let mut poll = mio::Poll::new().unwrap();
        let mut events = mio::Events::with_capacity(4);
        let wake = Wake::new(poll.registry(), mio::Token(0)).unwrap();
        let patience = Duration::from_millis(500);
        let mut arbiter = FileArbiter::new(path, patience);
        arbiter.attach(wake).unwrap();
        let start = Instant::from_millis(1000);
        arbiter.read(start, RequestId(1));
        assert_eq!(arbiter.deadline(), Some(start + patience));
        let late = start + patience;
        assert_eq!(
            arbiter.poll(late),
            Some((RequestId(1), Verdict::Unreachable))
        );
        assert_eq!(arbiter.poll(late), None, "told once");

        arbiter.read(late, RequestId(1));
        drop(held);
        poll.poll(&mut events, None).unwrap();
        assert_eq!(
            arbiter.poll(late),
            Some((RequestId(1), Verdict::Read(Register::default())))
        );
    }
}
