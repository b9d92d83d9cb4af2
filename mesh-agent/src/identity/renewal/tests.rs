use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
};

use tokio::sync::Semaphore;

use super::*;

/// Longer than anything here takes on a loaded machine; only a hang meets it.
const PATIENCE: Duration = Duration::from_secs(60);
const LIFETIME: Duration = Duration::from_secs(4);

/// Answers one request for each permit: fails as often as it is told, then signs for [`LIFETIME`].
#[derive(Clone)]
struct Flaky {
    permits: Arc<Semaphore>,
    failures_left: Arc<AtomicU64>,
    asked: Arc<AtomicU64>,
    /// By which its clock is ahead of ours.
    ahead_seconds: Arc<AtomicU64>,
    issuer: Arc<Issuer<'static, KeyPair>>,
    root_pem: String,
}

impl Flaky {
    fn new(failures: u64) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root_pem = params.self_signed(&key).unwrap().pem();
        Self {
            permits: Arc::new(Semaphore::new(1000)),
            failures_left: Arc::new(AtomicU64::new(failures)),
            asked: Arc::default(),
            ahead_seconds: Arc::default(),
            issuer: Arc::new(Issuer::new(params, key)),
            root_pem,
        }
    }
}

impl Authority for Flaky {
    async fn sign(&self, _: &Identity, csr_pem: String) -> Result<Vec<String>, CertificateError> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        self.permits.acquire().await.unwrap().forget();
        let failed = self
            .failures_left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        if failed.is_ok() {
            return Err(Box::new(tonic::Status::unavailable("not now")).into());
        }
        let mut request = CertificateSigningRequestParams::from_pem(&csr_pem).unwrap();
        let now = SystemTime::now() + Duration::from_secs(self.ahead_seconds.load(Ordering::Relaxed));
        // As authorities do, for skewed clocks: of so short a life, half of the whole is already over.
        request.params.not_before = (now - Duration::from_secs(60)).into();
        request.params.not_after = (now + LIFETIME).into();
        request.params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        Ok(vec![request.signed_by(&*self.issuer).unwrap().pem(), self.root_pem.clone()])
    }
}

fn identity(account: &str) -> Identity {
    Identity::new("cluster.local", "shop", account)
}

struct Running {
    certificates: Arc<Certificates>,
    store: Arc<CertificateStore>,
    stop: CancellationToken,
}

impl Running {
    fn start(authority: Flaky) -> Self {
        let (store, stop) = (CertificateStore::new(), CancellationToken::new());
        let certificates = Certificates::new(store.clone());
        tokio::spawn(certificates.clone().run(authority, stop.clone()));
        Self {
            certificates,
            store,
            stop,
        }
    }

    /// Waits for what attempts bring about.
    async fn until(&self, mut what: impl FnMut() -> bool) {
        let mut attempts = self.certificates.attempts.subscribe();
        let change = async {
            while !what() {
                attempts.changed().await.unwrap();
            }
        };
        tokio::time::timeout(PATIENCE, change).await.expect("it never came");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

#[tokio::test]
async fn failures_are_told_and_overcome_and_a_certificate_is_renewed_before_it_ends() {
    let running = Running::start(Flaky::new(2));
    let (web, pod) = (identity("web"), Arc::from("pod"));
    running.certificates.want(&web, &pod);
    running.until(|| running.certificates.failures().contains_key(&web)).await;
    let why = running.certificates.ready(&web, Duration::ZERO).await.unwrap_err();
    assert!(why.contains("not now"), "{why}");

    let first = running.certificates.ready(&web, PATIENCE).await.unwrap();
    let counted = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    assert_eq!(
        (
            counted(&running.certificates.failed_total),
            counted(&running.certificates.fetched_total)
        ),
        (2, 1)
    );
    assert!(running.certificates.failures().is_empty(), "overcome");

    let current = || running.store.current(&web).unwrap();
    running.until(|| current().fingerprint() != first.fingerprint()).await;
    assert!(!first.is_expired(SystemTime::now()), "there was one that holds all the time");
    assert!(current().not_after > first.not_after);

    assert_eq!(running.certificates.unwant("pod"), std::slice::from_ref(&web));
    assert!(running.store.current(&web).is_none());
}

#[tokio::test]
async fn what_is_not_valid_yet_is_not_taken_and_is_asked_for_until_the_clocks_agree() {
    let authority = Flaky::new(0);
    let ahead_seconds = authority.ahead_seconds.clone();
    let running = Running::start(authority);
    let web = identity("web");
    running.certificates.want(&web, &"pod".into());
    let first = running.certificates.ready(&web, PATIENCE).await.unwrap();

    ahead_seconds.store(3600, Ordering::Relaxed);
    // The renewal, and what is tried after it.
    let failed = || running.certificates.failed_total.load(Ordering::Relaxed);
    running.until(|| failed() >= 2).await;
    let why = running.certificates.failures().remove(&web).unwrap();
    assert!(
        why.contains("not valid now") && why.contains("this node's clock is behind the control plane's"),
        "{why}"
    );
    let current = || running.store.current(&web).unwrap();
    assert_eq!(current().fingerprint(), first.fingerprint(), "the one held stays in use");

    ahead_seconds.store(0, Ordering::Relaxed);
    running.until(|| current().fingerprint() != first.fingerprint()).await;
    assert!(current().not_before <= SystemTime::now());
    assert!(running.certificates.failures().is_empty(), "overcome");
}

#[tokio::test]
async fn a_certificate_whose_pod_left_meanwhile_is_not_kept() {
    let authority = Flaky {
        permits: Arc::new(Semaphore::new(0)),
        ..Flaky::new(0)
    };
    let (permits, asked) = (authority.permits.clone(), authority.asked.clone());
    let running = Running::start(authority);
    running.certificates.want(&identity("web"), &"first".into());
    let is_asked = async {
        while asked.load(Ordering::Relaxed) == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, is_asked).await.expect("nobody asks");
    assert_eq!(running.certificates.unwant("first"), [identity("web")]);
    permits.add_permits(1);
    let settled = || running.certificates.fetched_total.load(Ordering::Relaxed) == 1;
    running.until(settled).await;
    assert!(running.store.identities().is_empty(), "the answer came too late");
}

#[tokio::test]
async fn what_counts_no_longer_is_dropped_and_asked_for_again_when_it_can_be_had() {
    let authority = Flaky::new(0);
    let bundle = |pem: &str| Arc::new(TrustBundle::from_pem(&[pem.to_owned()]).unwrap());
    let (own, foreign) = (bundle(&authority.root_pem), bundle(&Flaky::new(0).root_pem));
    let running = Running::start(authority);
    let (web, pod) = (identity("web"), Arc::from("pod"));
    let none = BTreeSet::new();
    assert!(running.certificates.trust(Some(&own), &none).is_empty());
    running.certificates.want(&web, &pod);
    let first = running.certificates.ready(&web, PATIENCE).await.unwrap();

    // Its service account is deleted: nothing is asked for until it is back.
    assert_eq!(
        running.certificates.trust(Some(&own), &[web.clone()].into()),
        std::slice::from_ref(&web)
    );
    assert!(running.store.current(&web).is_none());
    assert!(running.certificates.to_remember().is_empty(), "nor is it remembered");
    let why = running.certificates.ready(&web, Duration::ZERO).await.unwrap_err();
    assert!(why.contains("deleted"), "{why}");
    assert!(running.certificates.trust(Some(&own), &none).is_empty());
    let second = running.certificates.ready(&web, PATIENCE).await.unwrap();
    assert_ne!(first.fingerprint(), second.fingerprint());

    // Its root is trusted no longer; what this authority signs then is of no use.
    assert_eq!(running.certificates.trust(Some(&foreign), &none), std::slice::from_ref(&web));
    running
        .until(|| {
            running
                .certificates
                .failures()
                .get(&web)
                .is_some_and(|why| why.contains("does not trust"))
        })
        .await;
    assert!(running.store.current(&web).is_none());
    assert!(running.certificates.trust(Some(&own), &none).is_empty());
    running.certificates.retry_failed();
    running.certificates.ready(&web, PATIENCE).await.unwrap();
}

/// Virtual time: it passes only in the waiting.
#[tokio::test(start_paused = true)]
async fn an_authority_that_does_not_answer_is_not_waited_for() {
    let silent = Flaky {
        permits: Arc::new(Semaphore::new(0)),
        ..Flaky::new(0)
    };
    let asked = tokio::time::timeout(PATIENCE, fetch(&silent, &identity("web"))).await;
    let answer = asked.expect("it is waited for without end");
    assert!(matches!(answer, Err(CertificateError::Timeout)));
}
